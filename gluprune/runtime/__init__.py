"""Running pruned MLPs: aligned storage, the fused operator, and patching."""
