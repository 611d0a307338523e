"""What `prune` checks before it changes anything."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from gluprune.calibration.statistics import Statistics, first_weights
from gluprune.models.consumers import consumer, verdict
from gluprune.models.glu import GLU
from gluprune.models.wrappers import check_weight
from gluprune.pruning.recipe import Recipe

logger = logging.getLogger(__name__)
_ROUNDING = 2.0**-7  # of bfloat16, with a margin; the smallest numbers of float16 are far below 1e-6


def common_width(widths: Sequence[int], layers: Sequence[int]) -> int:
    """Return the width that the chosen layers have.

    Args:
        widths: Intermediate size of every layer of the model.
        layers: Indices of the chosen layers.

    Raises:
        ValueError: They have different widths.
    """
    before = {widths[index] for index in layers}
    if len(before) > 1:
        raise ValueError(f"the chosen layers have different widths {sorted(before)}: prune them in separate calls")
    return before.pop()


def check_deploy(recipe: Recipe, widths: Sequence[int], model_type: str, *, heads: int, hidden_size: int) -> None:
    """Check that the program for which a model is pruned will take it.

    Args:
        recipe: Its `deploy` names the program, or is None.
        widths: Intermediate size of every layer after pruning.
        model_type: `config.model_type` of the text part.
        heads: Its number of attention heads.
        hidden_size: H.

    Raises:
        ValueError: The program refuses these sizes.
    """
    if recipe.deploy is None:
        return
    found = verdict(consumer(recipe.deploy), widths, model_type, heads=heads, hidden_size=hidden_size)
    if found.outcome == "refused":
        raise ValueError(f"deploy={recipe.deploy!r} refuses the result: {found.reason}")


def check_prunable(model: nn.Module, glus: Sequence[GLU], layers: Sequence[int]) -> None:
    """Check that the projections of some layers can be narrowed.

    Raises:
        ValueError: A projection is not a plain linear layer, or its weight is missing, sharded, quantized or shared.
    """
    for index in layers:
        for name, projection in glus[index].projections.items():
            _check_projection(f"layer {index}, {name}", projection)
    _check_not_shared(model, glus, layers)


def _check_projection(label: str, projection: nn.Module) -> None:
    if type(projection) is not nn.Linear:
        kind, package = type(projection).__name__, type(projection).__module__.partition(".")[0]
        found = f"{package}'s {kind}" if kind == nn.Linear.__name__ else kind
        raise ValueError(
            f"{label} is {found}, not nn.Linear: quantized or adapted projections cannot be"
            " pruned (dequantize, or merge the adapter, first)"
        )
    weight = projection.weight
    check_weight(label, weight)
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        raise ValueError(
            f"{label}.weight is {type(weight).__name__}, not a plain parameter: quantized or sharded weights"
            " cannot be pruned"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"{label}.weight has dtype {weight.dtype}; allowed: bf16, fp16, fp32 and fp64")


def _check_not_shared(model: nn.Module, glus: Sequence[GLU], layers: Sequence[int]) -> None:
    """Check that no other parameter shares memory with an MLP's: narrowing one would leave the other unchanged."""
    projections = [projection for index in layers for projection in glus[index].projections.values()]
    pruned = {id(parameter) for projection in projections for parameter in projection.parameters()}
    ranges = sorted(
        (str(parameter.device), *_address_range(parameter), name, id(parameter))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.device.type != "meta" and parameter.numel()
    )
    last = ("", 0, 0, "", 0)
    for current in ranges:
        (device, start, stop, name, identity), (last_device, _, end, owner, owner_id) = current, last
        if device == last_device and start < end and (identity in pruned or owner_id in pruned):
            raise ValueError(f"{owner} and {name} share memory: tied or shared MLP weights cannot be pruned")
        if device != last_device or stop > end:
            last = current


def _address_range(parameter: torch.Tensor) -> tuple[int, int]:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.data_ptr(), parameter.data_ptr() + extent * parameter.element_size()


def check_statistics(
    statistics: Statistics,
    widths: Sequence[int],
    layers: Sequence[int],
    recipe: Recipe,
    down: Callable[[int], torch.Tensor],
) -> None:
    """Check that statistics may be those of a model, by the widths of its layers, and hold what a recipe needs.

    If weights are not those of the model that was calibrated, a warning is logged.

    Args:
        statistics: From `calibrate`.
        widths: Intermediate size of every layer of the model.
        layers: Indices of the layers that are pruned.
        recipe: How they are pruned.
        down: Returns the weight of the down projection of a layer, or its first row.

    Raises:
        ValueError: A layer is missing, is not in the model or has another width, or Gram matrices or sensitivities are
            needed and missing.
    """
    if statistics.layers and max(statistics.layers) >= len(widths):
        raise ValueError(
            f"the calibration statistics have layer {max(statistics.layers)}, but the model has {len(widths)} layers:"
            " they are those of another model"
        )
    for index in layers:
        if index not in statistics.layers:
            raise ValueError(
                f"the calibration statistics have no layer {index}: they have layers {list(statistics.layers)}"
            )
        layer = statistics.layers[index]
        if len(layer.squares) != widths[index]:
            raise ValueError(
                f"layer {index} has {widths[index]} neurons, but the statistics were collected at"
                f" {len(layer.squares)}: calibrate the model in its present state before pruning"
            )
        if recipe.compensate and layer.gram is None:
            raise ValueError("compensate=True needs statistics with Gram matrices: calibrate(..., gram=True)")
        if recipe.needs.sensitivity and layer.costs is None:
            raise ValueError(
                "score='surgeon' and allocation='sensitivity' need statistics with sensitivities:"
                " calibrate(..., sensitivity=True)"
            )
    other = [index for index in layers if _is_other(statistics.layers[index].weights, down(index))]
    if other:
        logger.warning(
            "the calibration statistics were collected with other weights of %d of %d layers: if the model has changed"
            " since, or is another one, calibrate it again",
            len(other),
            len(layers),
        )


def _is_other(known: torch.Tensor | None, down: torch.Tensor) -> bool:
    """Whether weights are not those that a layer had when it was calibrated, perhaps in another dtype."""
    if known is None:
        return False
    return not torch.allclose(known.cpu(), first_weights(down.detach()).cpu(), rtol=_ROUNDING, atol=1e-6)
