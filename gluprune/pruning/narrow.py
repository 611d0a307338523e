"""Narrow one GLU in place, with undo and without a second copy of the model.

A weight is split into kept and removed rows (or columns) and the original is freed, so the two parts together take the
memory of the original. The removed part stays in an undo stack until the caller has finished all layers.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch

from gluprune.models.glu import GLU
from gluprune.pruning import host


def _set_attribute(owner: object, name: str, value: object, undo: ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _take(whole: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    return host.take(whole, dim, index) if whole.device.type == "cpu" else whole.index_select(dim, index)


def _shrink(parameter: torch.Tensor, dim: int, kept: torch.Tensor, removed: torch.Tensor, undo: ExitStack) -> None:
    """Keep the entries `kept` of `parameter` along `dim`; the Parameter object stays, its stale gradient is dropped."""
    whole = parameter.data
    shape, grad = whole.shape, parameter.grad
    kept, removed = kept.to(whole.device), removed.to(whole.device)
    kept_part, removed_part = _take(whole, dim, kept), _take(whole, dim, removed)
    del whole

    def restore() -> None:
        if parameter.shape != shape:
            original = removed_part.new_empty(shape)
            original.index_copy_(dim, kept, parameter.data)
            original.index_copy_(dim, removed, removed_part)
            parameter.data = original
        parameter.grad = grad

    undo.callback(restore)
    parameter.grad = None
    parameter.data = kept_part


def narrow(glu: GLU, kept: torch.Tensor, undo: ExitStack) -> None:
    """Keep the neurons `kept` of one GLU: rows of gate and up (and their biases), columns of down.

    Args:
        glu: The MLP; parameters, `in_features`, `out_features` and `intermediate_size` change in place.
        kept: int64 `[width]`, ascending, on the CPU.
        undo: Gets the callbacks that restore the former state bit for bit; closing it undoes, `pop_all()` commits.
    """
    width, before = len(kept), glu.intermediate_size
    is_removed = torch.ones(before, dtype=torch.bool)
    is_removed[kept] = False
    removed = is_removed.nonzero().squeeze(1)

    if glu.family.packed:
        rows = [(glu.gate, torch.cat([kept, kept + before]), torch.cat([removed, removed + before]))]
    else:
        rows = [(glu.gate, kept, removed), (glu.up, kept, removed)]
    for projection, kept_rows, removed_rows in rows:
        _shrink(projection.weight, 0, kept_rows, removed_rows, undo)
        if projection.bias is not None:
            _shrink(projection.bias, 0, kept_rows, removed_rows, undo)
        _set_attribute(projection, "out_features", len(kept_rows), undo)
    _shrink(glu.down.weight, 1, kept, removed, undo)
    _set_attribute(glu.down, "in_features", width, undo)
    if hasattr(glu.mlp, "intermediate_size"):
        _set_attribute(glu.mlp, "intermediate_size", width, undo)
