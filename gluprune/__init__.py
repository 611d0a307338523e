"""Width pruning for the GLU MLPs of Llama-type models."""
