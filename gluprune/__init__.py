"""Width pruning for the GLU MLPs of Llama-type models, and a fused forward that makes the narrower model faster."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gluprune.calibration.batches import batches_from_text
    from gluprune.calibration.collect import calibrate
    from gluprune.calibration.sample import sample_text
    from gluprune.calibration.statistics import Statistics
    from gluprune.checkpoints.export import export
    from gluprune.checkpoints.info import info
    from gluprune.checkpoints.load_save import load, save
    from gluprune.checkpoints.push import push_to_hub
    from gluprune.checkpoints.stream import prune_checkpoint
    from gluprune.io.wikipedia import wikipedia_text
    from gluprune.measure.perplexity import perplexity
    from gluprune.pruning.prune import prune
    from gluprune.pruning.recipe import Recipe
    from gluprune.pruning.reconstruct import reconstruct
    from gluprune.pruning.report import PruneReport
    from gluprune.runtime.fusion import fusion_status
    from gluprune.runtime.graphs import graph_decoding
    from gluprune.runtime.patching import patch, patch_llama, unpatch, unpatch_llama
    from gluprune.workflow.heal import heal
    from gluprune.workflow.shrink import shrink

__version__ = "0.1.0"

__all__ = [
    "PruneReport",
    "Recipe",
    "Statistics",
    "batches_from_text",
    "calibrate",
    "export",
    "fusion_status",
    "graph_decoding",
    "heal",
    "info",
    "load",
    "patch",
    "patch_llama",
    "perplexity",
    "prune",
    "prune_checkpoint",
    "push_to_hub",
    "reconstruct",
    "sample_text",
    "save",
    "shrink",
    "unpatch",
    "unpatch_llama",
    "wikipedia_text",
]

# Imported on first use: torch and transformers take seconds, which a command that needs no model should not wait for.
_MODULES = {
    "PruneReport": "pruning.report",
    "Recipe": "pruning.recipe",
    "Statistics": "calibration.statistics",
    "batches_from_text": "calibration.batches",
    "calibrate": "calibration.collect",
    "export": "checkpoints.export",
    "fusion_status": "runtime.fusion",
    "graph_decoding": "runtime.graphs",
    "heal": "workflow.heal",
    "info": "checkpoints.info",
    "load": "checkpoints.load_save",
    "patch": "runtime.patching",
    "patch_llama": "runtime.patching",
    "perplexity": "measure.perplexity",
    "prune": "pruning.prune",
    "prune_checkpoint": "checkpoints.stream",
    "push_to_hub": "checkpoints.push",
    "reconstruct": "pruning.reconstruct",
    "sample_text": "calibration.sample",
    "save": "checkpoints.load_save",
    "shrink": "workflow.shrink",
    "unpatch": "runtime.patching",
    "unpatch_llama": "runtime.patching",
    "wikipedia_text": "io.wikipedia",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
