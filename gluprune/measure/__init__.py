"""Measuring: latency, energy, memory, perplexity, and records of the measurements."""
