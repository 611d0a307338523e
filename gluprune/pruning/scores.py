"""Importance scores of GLU neurons: one float32 number per neuron, higher is kept.

The static scores are the criteria compared in *Fragile Knowledge, Robust Instruction-Following* (arXiv 2512.22671,
section on neuron selection), and the three-projection form of its magnitude criterion. The calibrated scores also use
the activations on text. All are computed on float32 values of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from csrc_triton.scores.reference import WeightStatistics
from gluprune.calibration.statistics import LayerStatistics
from gluprune.pruning.host import HostStatistics
from gluprune.runtime import operator

Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# The criteria from the weights: the statistics that each needs, and its formula. `WeightStatistics` and the kernel's
# statistics have the same field names.
STATIC_SCORES: dict[str, tuple[tuple[str, ...], Callable[..., torch.Tensor]]] = {
    # MAW, named PPM since version 3 of the paper: peak-to-peak magnitude of gate and up.
    "maw": (("gate_ppm", "up_ppm"), lambda gate, up: gate + up),
    "ppm": (("gate_ppm", "up_ppm"), lambda gate, up: gate + up),
    # The same over gate, up and down, so that the neuron's output weights count as well.
    "maw_gud": (("gate_ppm", "up_ppm", "down_ppm"), lambda gate, up, down: gate + up + down),
    # Variance of weights.
    "vow": (("gate_variance", "up_variance"), lambda gate, up: gate + up),
    # Product of (L1) norms.
    "pon": (("gate_l1", "up_l1"), lambda gate, up: gate * up),
    # Sum of L2 norms.
    "l2": (("gate_l2", "up_l2"), lambda gate, up: gate + up),
}


def static_score(name: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return the score of every neuron of one layer, computed from its weights.

    Args:
        name: A key of `STATIC_SCORES`.
        gate: `[I, H]`, any floating dtype, any strides.
        up: `[I, H]`, as for `gate`.
        down: `[H, I]`, as for `gate`.

    Returns:
        float32 `[I]` on the device of the weights.
    """
    wanted, formula = STATIC_SCORES[name]
    if operator.uses_kernels("auto", gate.device) and gate.dtype in operator.KERNEL_DTYPES:
        from csrc_triton.scores.kernel import neuron_scores  # imports Triton

        statistics = neuron_scores(gate, up, down, wanted)
    else:
        statistics = _statistics(gate, up, down)
    return formula(*(getattr(statistics, field) for field in wanted))


def _statistics(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> WeightStatistics:
    return (HostStatistics if gate.device.type == "cpu" else WeightStatistics)(gate, up, down)


def _hybrid(weights: WeightStatistics, activations: LayerStatistics) -> torch.Tensor:
    ppms = (weights.gate_ppm, weights.up_ppm, weights.down_ppm)
    gate, up, down = (ppm / (ppm.max() + 1e-8) for ppm in ppms)
    return (gate + up + down) * activations.batch_norms


def _surgeon(weights: WeightStatistics, activations: LayerStatistics) -> torch.Tensor:
    assert activations.saliency is not None
    return activations.saliency


CALIBRATED_SCORES: dict[str, Callable[[WeightStatistics, LayerStatistics], torch.Tensor]] = {
    # ||x_i|| * ||W_down[:, i]||: the exact Frobenius norm of the contribution of neuron i to the layer's output over
    # all tokens, x_i W_down[:, i]^T. Wanda (arXiv 2306.11695) multiplies the same norms per weight, FLAP (arXiv
    # 2312.11983) uses the fluctuation of x_i in place of its norm.
    "activation": lambda weights, activations: activations.norms * weights.down_l2,
    # The data-driven criterion of OptiPFair 0.4.2: PPM of gate, up and down, each over its maximum, times ||x_i||. Its
    # ||x_i|| is the sum of the norms of the batches, not the norm over all tokens, so it depends on the batches. It is
    # kept so that equal batches select equal neurons.
    "hybrid": _hybrid,
    # How much the loss rises if the neuron is removed and the others are refitted:
    # `gluprune.calibration.sensitivity.saliencies`.
    "surgeon": _surgeon,
}


def calibrated_score(
    name: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, activations: LayerStatistics
) -> torch.Tensor:
    """Return the score of every neuron of one layer, computed from its weights and its statistics on text.

    Args:
        name: A key of `CALIBRATED_SCORES`.
        gate: `[I, H]`, any floating dtype, any strides.
        up: `[I, H]`, as for `gate`.
        down: `[H, I]`, as for `gate`.
        activations: Statistics of the layer.

    Returns:
        float32 `[I]` on the device of the weights.
    """
    return CALIBRATED_SCORES[name](_statistics(gate, up, down), activations)


class LayerWeights(Protocol):
    """What is scored: a `gluprune.models.glu.GLU`, or the weights of one layer read from a file."""

    @property
    def intermediate_size(self) -> int:
        """The number of neurons I."""
        ...

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return gate `[I, H]`, up `[I, H]` and down `[H, I]`."""
        ...


def score_layer(
    score: str | Score, layer: LayerWeights, index: int, activations: LayerStatistics | None = None
) -> torch.Tensor:
    """Return the score of every neuron of a layer, checked.

    Args:
        score: A name of `STATIC_SCORES` or `CALIBRATED_SCORES`, or a callable.
        layer: The weights.
        index: Index of the layer, for error messages.
        activations: Statistics of the layer, for a calibrated score.

    Returns:
        float32 `[I]` on the CPU.

    Raises:
        ValueError: The score has the wrong shape or contains NaN.
    """
    weights = layer.weights()
    if callable(score):
        values = score(*weights)
    elif score in CALIBRATED_SCORES:
        assert activations is not None
        values = calibrated_score(score, *weights, activations)
    else:
        values = static_score(score, *weights)
    expected = (layer.intermediate_size,)
    if not isinstance(values, torch.Tensor) or values.shape != expected:
        found = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"the score of layer {index} must be a tensor of shape {list(expected)}, got {found}")
    values = values.detach().float().cpu()
    if values.isnan().any():
        raise ValueError(f"the score of layer {index} has {int(values.isnan().sum())} NaN of {len(values)} values")
    return values
