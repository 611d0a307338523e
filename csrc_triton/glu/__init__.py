"""The fused GLU MLP: its weights, the kernels of its parts, and the forward pass."""
