"""Checkpoints: loading, saving, describing, and pruning on disk."""
