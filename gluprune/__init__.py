"""Width pruning for the GLU MLPs of Llama-type models, and a fused forward that makes the narrower model faster."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gluprune.checkpoints.load_save import load, save
    from gluprune.pruning.prune import PruneReport, prune
    from gluprune.pruning.reconstruct import reconstruct
    from gluprune.runtime.patching import patch, patch_llama, unpatch, unpatch_llama

__version__ = "0.1.0"

__all__ = ["PruneReport", "load", "patch", "patch_llama", "prune", "reconstruct", "save", "unpatch", "unpatch_llama"]

# Imported when asked for: transformers takes seconds, which a command that needs no model should not wait for.
_MODULES = {
    **dict.fromkeys(("load", "save"), "checkpoints.load_save"),
    **dict.fromkeys(("patch", "patch_llama", "unpatch", "unpatch_llama"), "runtime.patching"),
    **dict.fromkeys(("PruneReport", "prune"), "pruning.prune"),
    "reconstruct": "pruning.reconstruct",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
