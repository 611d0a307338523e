"""The whole way from a dense checkpoint to a pruned one in one call."""
