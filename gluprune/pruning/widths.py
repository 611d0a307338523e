"""How many neurons are kept in every layer, and which."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from gluprune.calibration.sensitivity import removed_counts
from gluprune.calibration.statistics import Statistics
from gluprune.models.widths import widths_after
from gluprune.pruning.checks import check_deploy
from gluprune.pruning.recipe import Recipe

logger = logging.getLogger(__name__)
_FINE = 8  # rows of as many values of 16 bits start at 16-byte boundaries


def percent_hint(ratio: float) -> str:
    """Return the question that ends an error message where a ratio looks like a percentage; else an empty string."""
    return f": did you mean {ratio / 100:g}?" if 2 <= ratio < 100 else ""


def target_width(
    intermediate_size: int,
    hidden_size: int,
    *,
    expansion_ratio: float | None = None,
    pruning_ratio: float | None = None,
    width: int | None = None,
    multiple_of: int = 128,
) -> int:
    """Return the intermediate size for a target.

    Exactly one of the three targets must be given. The result is the multiple of `multiple_of` that is nearest to the
    target; halves round up.

    Args:
        intermediate_size: Current number of neurons I.
        hidden_size: H.
        expansion_ratio: Target r means `r * hidden_size`.
        pruning_ratio: Target p means `I - int(p * I)`, the rule of arXiv 2512.22671.
        width: Target given as a number of neurons.
        multiple_of: 128 keeps every row of the narrowed weights aligned to 256 bytes in bf16; 1 allows any width.

    Returns:
        A width in `[1, I - 1]`.

    Raises:
        ValueError: No target or more than one, a target out of range, or a width that rounds to 0 or to I or above.
        TypeError: A target that is not a number.
    """
    targets: dict[str, Any] = {
        "expansion_ratio": expansion_ratio,
        "pruning_ratio": pruning_ratio,
        "intermediate_size": width,
    }
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of {', '.join(targets)}; "
            f"got {' and '.join(f'{name}={value}' for name, value in given.items()) or 'none'}"
        )
    (name, value), *_ = given.items()
    if isinstance(value, bool) or not isinstance(value, Integral if name == "intermediate_size" else Real):
        kind = "an integer" if name == "intermediate_size" else "a number"
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, Integral) or multiple_of < 1:
        raise ValueError(f"multiple_of must be an integer of at least 1, got {multiple_of!r}")

    number = float(value)  # of Python, whose arithmetic is in double precision
    if name == "pruning_ratio":
        if not 0 < number < 1:
            raise ValueError(
                f"pruning_ratio must lie between 0 and 1 (both excluded), got {value}{percent_hint(number)}"
            )
        wanted = intermediate_size - int(number * intermediate_size)
    elif name == "expansion_ratio":
        current = intermediate_size / hidden_size
        if not 0 < number < current:
            hint = f": did you mean intermediate_size={number:g}?" if current < number < intermediate_size else ""
            raise ValueError(
                f"expansion_ratio must lie between 0 and the current {current:.4g} (both excluded), got {value}{hint}"
            )
        wanted = round(number * hidden_size)
    else:
        if not 0 < number < intermediate_size:
            raise ValueError(
                f"intermediate_size must lie between 1 and {intermediate_size - 1} (currently {intermediate_size}),"
                f" got {value}"
            )
        wanted = int(number)

    rounded = (2 * wanted + multiple_of) // (2 * multiple_of) * multiple_of
    if not 0 < rounded < intermediate_size:
        raise ValueError(
            f"{name}={value} asks for {wanted} neurons, which rounds to {rounded} with multiple_of={multiple_of};"
            f" allowed is 1 to {intermediate_size - 1}: use another target or a smaller multiple_of"
        )
    return int(rounded)


def _lower_hull(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the corners of the lower convex hull of points with ascending x; for equal x the first counts."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        if hull and point[0] == hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [x for x, _ in hull], [y for _, y in hull]


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def widths_by_cost(
    costs: Sequence[torch.Tensor], removed: Sequence[int], intermediate_size: int, width: int, *, multiple_of: int = 128
) -> list[int]:
    """Return a width for each layer, with mean `width`, at which the total cost of narrowing is lowest.

    Greedy: in each step, the layer whose next `multiple_of` neurons cost least loses them. This is optimal if the costs
    of every layer are convex. If not, their lower convex hull is used.

    Args:
        costs: For each layer float32 `[P]`, the cost of removing `removed` neurons; interpolated linearly.
        removed: `[P]`, numbers of removed neurons, ascending from 0, below I; for repeats the first counts.
        intermediate_size: Current number of neurons I of every layer.
        width: The requested mean.
        multiple_of: Every width is a multiple of this, except I itself.

    Returns:
        Widths from I minus the largest of `removed` to I. Their sum is `width` times the number of layers, or less by
        less than `multiple_of` if I is not a multiple of it.

    Raises:
        ValueError: `width` is so small that some layer would lose more neurons than the largest of `removed`.
    """
    hulls = [_lower_hull(removed, layer.tolist()) for layer in costs]
    widths = [intermediate_size] * len(costs)
    smallest = intermediate_size - removed[-1]

    def next_width(layer: int) -> int:
        return (widths[layer] - 1) // multiple_of * multiple_of

    def next_step(layer: int) -> tuple[float, int]:
        """Return the cost per neuron of the layer's next step, and the layer."""
        steps = intermediate_size - np.array([widths[layer], next_width(layer)])
        now, then = np.interp(steps, *hulls[layer])
        return (then - now) / (widths[layer] - next_width(layer)), layer

    heap = [next_step(layer) for layer in range(len(costs)) if next_width(layer) >= smallest]
    heapq.heapify(heap)
    while sum(widths) > width * len(costs):
        if not heap:
            raise ValueError(
                f"a mean width of {width} leaves layers with fewer than {smallest} of their {intermediate_size}"
                " neurons: costs are not known below that; keep more neurons, or use allocation='uniform'"
            )
        _, layer = heapq.heappop(heap)
        widths[layer] = next_width(layer)
        if next_width(layer) >= smallest:
            heapq.heappush(heap, next_step(layer))
    return widths


def cost_of_coarseness(
    costs: Sequence[torch.Tensor], removed: Sequence[int], intermediate_size: int, width: int, *, multiple_of: int
) -> float:
    """Return the total cost at the cheapest multiples of `multiple_of`, over that at multiples of 8; 1 is as cheap.

    Args:
        costs: As for `widths_by_cost`, and so are the others.
        removed: `[P]`.
        intermediate_size: I.
        width: The requested mean.
        multiple_of: What widths are multiples of.
    """

    def total(multiple: int) -> float:
        widths = widths_by_cost(costs, removed, intermediate_size, width, multiple_of=multiple)
        hulls = (_lower_hull(removed, layer.tolist()) for layer in costs)
        return sum(float(np.interp(intermediate_size - kept, *hull)) for kept, hull in zip(widths, hulls, strict=True))

    fine = total(math.gcd(multiple_of, _FINE))
    return total(multiple_of) / fine if fine else 1.0


def shrunk_costs(costs: Sequence[torch.Tensor], kept_share: float) -> list[torch.Tensor]:
    """Return costs shrunk towards their mean over the layers, in the logarithm: cost^s mean^(1 - s).

    The cost of a layer was measured with all others dense. The more the others lose, the less it says: layers that can
    replace each other look cheap one by one, but removing from all of them is not cheap.

    Args:
        costs: For each layer float32 `[P]`, at the same numbers of removed neurons.
        kept_share: s, the share of neurons that are kept, between 0 and 1.

    Returns:
        For each layer float32 `[P]`, on the CPU.
    """
    stacked = torch.stack([layer.cpu() for layer in costs])  # [layers, P]
    return list(stacked**kept_share * stacked.mean(0) ** (1 - kept_share))


def allocated_widths(
    layers: Sequence[int],
    *,
    allocation: str,
    statistics: Iterable | Statistics | None,
    intermediate_size: int,
    width: int,
    multiple_of: int,
) -> dict[int, int]:
    """Return layer index -> number of neurons that are kept, with mean `width`.

    Args:
        layers: Indices of the layers that are pruned.
        allocation: "uniform" or "sensitivity".
        statistics: `Statistics` with sensitivities; not used by "uniform".
        intermediate_size: Current number of neurons I of every layer.
        width: The requested mean.
        multiple_of: See `widths_by_cost`.

    Raises:
        ValueError: "sensitivity" without `Statistics`, or with a width too small for it.
    """
    if allocation == "uniform":
        return dict.fromkeys(layers, width)
    if not isinstance(statistics, Statistics):
        raise ValueError(
            "allocation='sensitivity' needs Statistics of all layers: calibration=calibrate(..., sensitivity=True)"
        )
    costs = [cost for layer in layers if (cost := statistics.layers[layer].costs) is not None]
    costs = shrunk_costs(costs, width / intermediate_size)
    removed = removed_counts(intermediate_size)
    widths = widths_by_cost(costs, removed, intermediate_size, width, multiple_of=multiple_of)
    if multiple_of > _FINE:
        ratio = cost_of_coarseness(costs, removed, intermediate_size, width, multiple_of=multiple_of)
        logger.info(
            f"widths in multiples of {multiple_of}: the predicted rise of the loss is {ratio:.2f} times that of"
            f" multiples of {math.gcd(multiple_of, _FINE)}"
        )
    return dict(zip(layers, widths, strict=True))


def planned_widths(
    present: Sequence[int],
    layers: Sequence[int],
    recipe: Recipe,
    statistics: Iterable | Statistics | None,
    *,
    width: int,
    model_type: str,
    heads: int,
    hidden_size: int,
) -> dict[int, int]:
    """Return layer index -> number of neurons that are kept, checked against the program that the recipe is for.

    Args:
        present: Intermediate size of every layer of the model.
        layers: Indices of the layers that are pruned; they have the same width.
        recipe: How the width is spread over them, and for which program.
        statistics: See `allocated_widths`.
        width: The requested mean.
        model_type: `config.model_type` of the text part.
        heads: Its number of attention heads.
        hidden_size: H.

    Raises:
        ValueError: See `allocated_widths` and `check_deploy`.
    """
    widths = allocated_widths(
        layers,
        allocation=recipe.allocation,
        statistics=statistics,
        intermediate_size=present[layers[0]],
        width=width,
        multiple_of=recipe.width_multiple,
    )
    check_deploy(recipe, widths_after(present, widths), model_type, heads=heads, hidden_size=hidden_size)
    return widths


def select(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Return the `width` neurons of highest score, as ascending indices.

    The choice is made on the CPU, so that equal scores select equal neurons on every device.

    Args:
        scores: float32 `[I]`.
        width: How many to keep, 1 to I.

    Returns:
        int64 `[width]` on the CPU, ascending.
    """
    return torch.topk(scores.cpu(), width, sorted=False).indices.sort().values
