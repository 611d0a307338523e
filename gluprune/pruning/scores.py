"""Importance scores of GLU neurons: one float32 number a neuron, higher is kept.

The static criteria are those compared in *Fragile Knowledge, Robust Instruction-Following* (arXiv 2512.22671), section
on neuron selection, plus the three-projection form of its magnitude criterion. The calibrated ones also look at what
the neurons do on text. All work on float32 values of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from gluprune.calibration.statistics import LayerStatistics
from gluprune.runtime import operator

Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Rows worked on at a time: what is read twice is in the cache the second time, and an upcast takes a few MB at most.
_ROWS = 512


def _ppm(weight: torch.Tensor, dim: int) -> torch.Tensor:
    # Extremes are exact in any dtype, so only the two vectors are upcast. (In bf16 on a CPU amax and amin together are
    # three times as fast as aminmax.)
    return weight.amax(dim).float() + weight.amin(dim).float().abs()


def _by_rows(reduce: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([reduce(rows) for rows in weight.split(_ROWS)])


class WeightStatistics:
    """Per-neuron statistics of one layer's gate `[I, H]`, up `[I, H]` and down `[H, I]`, each computed when asked for.

    All are float32 `[I]`: `*_ppm` peak-to-peak magnitude `max + |min|` over a row of gate or up or a column of down,
    `*_variance` unbiased row variance, `*_l1` and `*_l2` row norms.
    """

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor):
        self._gate, self._up, self._down = gate, up, down

    @cached_property
    def gate_ppm(self) -> torch.Tensor:
        return _by_rows(lambda rows: _ppm(rows, 1), self._gate)

    @cached_property
    def up_ppm(self) -> torch.Tensor:
        return _by_rows(lambda rows: _ppm(rows, 1), self._up)

    @cached_property
    def down_ppm(self) -> torch.Tensor:
        return _ppm(self._down, 0)

    @cached_property
    def down_l2(self) -> torch.Tensor:
        return torch.cat([torch.norm(columns.float(), p=2, dim=0) for columns in self._down.split(_ROWS, dim=1)])

    @cached_property
    def gate_variance(self) -> torch.Tensor:
        return _by_rows(lambda rows: torch.var(rows.float(), dim=1), self._gate)

    @cached_property
    def up_variance(self) -> torch.Tensor:
        return _by_rows(lambda rows: torch.var(rows.float(), dim=1), self._up)

    @cached_property
    def gate_l1(self) -> torch.Tensor:
        return _by_rows(lambda rows: torch.norm(rows.float(), p=1, dim=1), self._gate)

    @cached_property
    def up_l1(self) -> torch.Tensor:
        return _by_rows(lambda rows: torch.norm(rows.float(), p=1, dim=1), self._up)

    @cached_property
    def gate_l2(self) -> torch.Tensor:
        return _by_rows(lambda rows: torch.norm(rows.float(), p=2, dim=1), self._gate)

    @cached_property
    def up_l2(self) -> torch.Tensor:
        return _by_rows(lambda rows: torch.norm(rows.float(), p=2, dim=1), self._up)


# Both providers of statistics have the same field names.
STATIC_SCORES: dict[str, Callable[..., torch.Tensor]] = {
    # MAW, named PPM since version 3 of the paper: peak-to-peak magnitude of gate and up.
    "maw": lambda s: s.gate_ppm + s.up_ppm,
    "ppm": lambda s: s.gate_ppm + s.up_ppm,
    # The same over gate, up and down: a neuron also counts by what it writes.
    "maw_gud": lambda s: s.gate_ppm + s.up_ppm + s.down_ppm,
    # Variance of weights.
    "vow": lambda s: s.gate_variance + s.up_variance,
    # Product of (L1) norms.
    "pon": lambda s: s.gate_l1 * s.up_l1,
    # Sum of L2 norms.
    "l2": lambda s: s.gate_l2 + s.up_l2,
}


def static_score(name: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Score of every neuron of one layer by a criterion of `STATIC_SCORES`.

    Args:
        name: a key of `STATIC_SCORES`.
        gate, up: `[I, H]`; down: `[H, I]`; any floating dtype, any strides.

    Returns:
        float32 `[I]` on the device of the weights.
    """
    if operator.uses_kernels("auto", gate.device) and gate.dtype in operator.KERNEL_DTYPES:
        return STATIC_SCORES[name](operator.neuron_statistics(gate, up, down))
    return STATIC_SCORES[name](WeightStatistics(gate, up, down))


def _hybrid(weights: WeightStatistics, activations: LayerStatistics) -> torch.Tensor:
    ppms = (weights.gate_ppm, weights.up_ppm, weights.down_ppm)
    gate, up, down = (ppm / (ppm.max() + 1e-8) for ppm in ppms)
    return (gate + up + down) * activations.batch_norms


CALIBRATED_SCORES: dict[str, Callable[[WeightStatistics, LayerStatistics], torch.Tensor]] = {
    # ||x_i|| * ||W_down[:, i]||: the exact Frobenius norm of what neuron i adds to the layer's output over all tokens,
    # x_i W_down[:, i]^T. Wanda (arXiv 2306.11695) multiplies the same norms per weight, FLAP (arXiv 2312.11983) takes
    # the fluctuation of x_i in place of its norm.
    "activation": lambda weights, activations: activations.norms * weights.down_l2,
    # OptiPFair 0.4.2's data-driven criterion (PPM of gate, up and down, each over its maximum, times ||x_i||). Its
    # ||x_i|| is the sum of the batches' norms, no norm of all tokens, and so depends on the batches; kept as it is, so
    # that equal batches select equal neurons.
    "hybrid": _hybrid,
    # By how much the loss rises when the neuron goes and the others make up for it (`gluprune.calibration.sensitivity.saliencies`).
    "surgeon": lambda weights, activations: activations.saliency,
}


def calibrated_score(
    name: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, activations: LayerStatistics
) -> torch.Tensor:
    """Score of every neuron of one layer by a criterion of `CALIBRATED_SCORES`.

    Args:
        name: a key of `CALIBRATED_SCORES`.
        gate, up: `[I, H]`; down: `[H, I]`; any floating dtype, any strides.
        activations: the layer's statistics on calibration text.

    Returns:
        float32 `[I]` on the device of the weights.
    """
    return CALIBRATED_SCORES[name](WeightStatistics(gate, up, down), activations)
