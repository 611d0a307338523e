"""Triton kernels for width-pruned GLU MLPs. They import only torch and Triton and are independent of models.

The names below are loaded on first use, so that `import csrc_triton` needs neither Triton nor CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from csrc_triton.glu.forward import glu_mlp
    from csrc_triton.glu.weights import GluWeights
    from csrc_triton.norm import rms_norm
    from csrc_triton.scores.kernel import NeuronStatistics, neuron_scores

__all__ = ["GluWeights", "NeuronStatistics", "glu_mlp", "neuron_scores", "rms_norm"]

_MODULES = {
    "GluWeights": "csrc_triton.glu.weights",
    "NeuronStatistics": "csrc_triton.scores.kernel",
    "glu_mlp": "csrc_triton.glu.forward",
    "neuron_scores": "csrc_triton.scores.kernel",
    "rms_norm": "csrc_triton.norm",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
