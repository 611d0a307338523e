"""The demonstration on a small real model."""
