"""RMSNorms that run as one kernel: part of `patch`.

Only calls without autograd run fused: training and torch.compile, which fuses norms by itself, run the eager code.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from gluprune.runtime import fusion, operator
from gluprune.runtime.classes import Swapped, fused_class, set_class
from gluprune.runtime.prepared import PreparedNorm, keep_prepared, run_prepared


class FusedNorm(Swapped):
    """The forward of a patched RMSNorm."""

    rounding: str
    weight: torch.Tensor

    @staticmethod
    def class_attributes(original: type[nn.Module]) -> dict[str, Any]:
        """Return how the family of a class rounds."""
        return {"rounding": fusion.ROUNDING_OF_NORM[original.__name__]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the original forward returns for `x` `[..., H]`, bit for bit but for the order of the sum."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        y = run_prepared(self, x)
        if y is not None:
            return y
        if not fusion.is_norm_fusible(self, x):
            return super().forward(x)
        keep_prepared(self, lambda: PreparedNorm(self))
        return operator.rms_norm(x, self.weight, fusion.epsilon(self), self.rounding)


def patch_norms(model: nn.Module, backend: str, wanted: bool | None, undo: ExitStack) -> None:
    """Swap the classes of the RMSNorms of a model that `wanted` (see `patch`) selects; restore those of all others.

    Args:
        model: Changed in place.
        backend: As for the MLPs.
        wanted: True, False, or None for the norms on CUDA.
        undo: Gets what takes each change back.
    """
    for module in list(model.modules()):
        original = fusion.norm_class(module)
        if original is None or not fusion.may_swap_norm(module):
            continue
        weight: Any = module.weight
        selected = weight.device.type == "cuda" if wanted is None else wanted
        new = fused_class(FusedNorm, original, backend) if selected and backend != "torch" else original
        if type(module) is not new:
            undo.callback(set_class, module, type(module))
            set_class(module, new)


def unpatch_norms(model: nn.Module) -> None:
    """Give all norms of a model the class that they had before `patch_norms`."""
    for module in list(model.modules()):
        if isinstance(module, FusedNorm):
            set_class(module, module.original_class)
