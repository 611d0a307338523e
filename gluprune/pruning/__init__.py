"""Choosing neurons, removing them, and refitting the weights that remain."""
