"""The models that can be pruned: families, their MLPs, and widths in configs."""
