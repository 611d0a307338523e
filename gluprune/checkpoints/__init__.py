"""Checkpoints: loading, saving, describing, and pruning on the disk."""
