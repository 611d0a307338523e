"""The statistics of `csrc_triton.scores.kernel` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

# Rows or columns at a time: what is read twice is in the cache the second time, and an upcast takes a few MB at most.
_LINES = 512


def _ppm(weight: torch.Tensor, dim: int) -> torch.Tensor:
    weight = weight.float()
    return weight.amax(dim) + weight.amin(dim).abs()


def _variance(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.float()  # on a CPU, torch.var takes ten times as long
    return (rows - rows.mean(1, keepdim=True)).square().sum(1) / (rows.shape[1] - 1)


class WeightStatistics:
    """The equivalent of `neuron_scores`: the same fields, each computed on first use; on any device, for any strides.

    All are float32 `[I]`: `*_ppm` peak-to-peak magnitude `max + |min|` over a row of gate or up or a column of down,
    `*_variance` unbiased row variance, `*_l1` and `*_l2` row norms; and `down_l2`, the norms of the columns of down.

    Args:
        gate: `[I, H]`.
        up: `[I, H]`.
        down: `[H, I]`.
    """

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor):
        self._gate, self._up, self._down = gate, up, down

    def _reduced(self, weight: torch.Tensor, dim: int, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the results of a reduction along `dim`, concatenated."""
        return torch.cat([reduce(piece) for piece in weight.split(_LINES, 1 - dim)])

    def _peak_to_peak(self, weight: torch.Tensor, dim: int) -> torch.Tensor:
        return self._reduced(weight, dim, lambda piece: _ppm(piece, dim))

    @cached_property
    def gate_ppm(self) -> torch.Tensor:
        """Peak-to-peak magnitude of the rows of gate."""
        return self._peak_to_peak(self._gate, 1)

    @cached_property
    def up_ppm(self) -> torch.Tensor:
        """Peak-to-peak magnitude of the rows of up."""
        return self._peak_to_peak(self._up, 1)

    @cached_property
    def down_ppm(self) -> torch.Tensor:
        """Peak-to-peak magnitude of the columns of down."""
        return self._peak_to_peak(self._down, 0)

    @cached_property
    def down_l2(self) -> torch.Tensor:
        """Euclidean norm of the columns of down."""
        return self._reduced(self._down, 0, lambda columns: torch.norm(columns.float(), p=2, dim=0))

    @cached_property
    def gate_variance(self) -> torch.Tensor:
        """Unbiased variance of the rows of gate."""
        return self._reduced(self._gate, 1, _variance)

    @cached_property
    def up_variance(self) -> torch.Tensor:
        """Unbiased variance of the rows of up."""
        return self._reduced(self._up, 1, _variance)

    @cached_property
    def gate_l1(self) -> torch.Tensor:
        """Sum of magnitudes of the rows of gate."""
        return self._reduced(self._gate, 1, lambda rows: rows.float().abs().sum(1))

    @cached_property
    def up_l1(self) -> torch.Tensor:
        """Sum of magnitudes of the rows of up."""
        return self._reduced(self._up, 1, lambda rows: rows.float().abs().sum(1))

    @cached_property
    def gate_l2(self) -> torch.Tensor:
        """Euclidean norm of the rows of gate."""
        return self._reduced(self._gate, 1, lambda rows: torch.norm(rows.float(), p=2, dim=1))

    @cached_property
    def up_l2(self) -> torch.Tensor:
        """Euclidean norm of the rows of up."""
        return self._reduced(self._up, 1, lambda rows: torch.norm(rows.float(), p=2, dim=1))
