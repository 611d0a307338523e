"""Neuron activations on text, and the sensitivity of the loss to removing neurons."""
