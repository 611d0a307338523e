"""Measuring: latency, energy, memory, perplexity, and the records of it."""
