"""Importance statistics of the neurons of a GLU MLP."""
