"""Width pruning for the GLU MLPs of Llama-type models, and a fused forward that makes the narrower model faster."""

from gluprune.checkpoint import load, save
from gluprune.patching import patch, patch_llama, unpatch, unpatch_llama
from gluprune.pruning import PruneReport, prune

__version__ = "0.1.0"

__all__ = ["PruneReport", "load", "patch", "patch_llama", "prune", "save", "unpatch", "unpatch_llama"]
