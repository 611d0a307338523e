"""Triton kernels for width-pruned GLU MLPs. Imports only torch and triton, knows no model."""
