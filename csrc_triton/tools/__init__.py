"""Offline tools: the tuner and the ahead-of-time check."""
