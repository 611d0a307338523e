"""Width pruning for the GLU MLPs of Llama-type models."""

from gluprune.checkpoint import load, save
from gluprune.pruning import PruneReport, prune

__version__ = "0.1.0"

__all__ = ["PruneReport", "load", "prune", "save"]
