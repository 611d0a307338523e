"""How many neurons stay, and which."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch


def target_width(
    intermediate_size: int,
    hidden_size: int,
    *,
    expansion_ratio: float | None = None,
    pruning_ratio: float | None = None,
    width: int | None = None,
    multiple_of: int = 128,
) -> int:
    """The intermediate size that a target asks for.

    Exactly one of the three targets must be given. `expansion_ratio` r asks for `r * hidden_size`, `pruning_ratio` p
    for `I - int(p * I)` (the rule of arXiv 2512.22671), `width` for itself; the answer is the multiple of
    `multiple_of` nearest to that, halves upwards.

    Args:
        intermediate_size: today's number of neurons I.
        hidden_size: H.
        multiple_of: 128 keeps every row of the narrowed weights aligned to 256 bytes in bf16; 1 gives exact widths.

    Returns:
        A width in `[1, I - 1]`.

    Raises:
        ValueError: no target or more than one, a target out of range, or a width that rounds to 0 or to I or above.
        TypeError: a target that is no number.
    """
    targets = {"expansion_ratio": expansion_ratio, "pruning_ratio": pruning_ratio, "intermediate_size": width}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of {', '.join(targets)}; "
            f"got {' and '.join(f'{name}={value}' for name, value in given.items()) or 'none'}"
        )
    (name, value), *_ = given.items()
    if isinstance(value, bool) or not isinstance(value, int if name == "intermediate_size" else (int, float)):
        kind = "an integer" if name == "intermediate_size" else "a number"
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of must be an integer of at least 1, got {multiple_of!r}")

    if name == "pruning_ratio":
        if not 0 < value < 1:
            raise ValueError(f"pruning_ratio must lie between 0 and 1 (both excluded), got {value}")
        wanted = intermediate_size - int(value * intermediate_size)
    elif name == "expansion_ratio":
        today = intermediate_size / hidden_size
        if not 0 < value < today:
            raise ValueError(f"expansion_ratio must lie between 0 and today's {today:.4g} (both excluded), got {value}")
        wanted = round(value * hidden_size)
    else:
        if not 0 < value < intermediate_size:
            raise ValueError(
                f"intermediate_size must lie between 1 and {intermediate_size - 1} (today it is {intermediate_size}),"
                f" got {value}"
            )
        wanted = value

    rounded = (2 * wanted + multiple_of) // (2 * multiple_of) * multiple_of
    if not 0 < rounded < intermediate_size:
        raise ValueError(
            f"{name}={value} asks for {wanted} neurons, which rounds to {rounded} with multiple_of={multiple_of};"
            f" allowed is 1 to {intermediate_size - 1}: use another target or a smaller multiple_of"
        )
    return rounded


def _lower_hull(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The corners of the largest convex function that is nowhere above the points; x ascending, repeats left out."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y):
        if hull and point[0] == hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return tuple(map(list, zip(*hull)))


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def widths_by_cost(
    costs: Sequence[torch.Tensor], removed: Sequence[int], intermediate_size: int, width: int, *, multiple_of: int = 128
) -> list[int]:
    """A width for each layer, `width` on the average, so that what narrowing costs is least in total.

    Greedy: step by step, the layer whose next `multiple_of` neurons cost least loses them. That is best where every
    layer's costs rise ever more steeply; where they do not, their lower convex hull takes their place.

    Args:
        costs: of each layer float32 `[P]`, what it costs that so many of its neurons go; linear in between.
        removed: `[P]`, how many, ascending from 0, below I; of repeats the first counts.
        intermediate_size: today's number of neurons I of every layer.
        width: the average asked for.
        multiple_of: of every width but I itself, whose layer is left alone.

    Returns:
        Widths from I less the largest of `removed` to I. They add up to `width` times the number of layers; where I is
        no multiple of `multiple_of`, to fewer by less than `multiple_of`.

    Raises:
        ValueError: `width` is so small that more than the largest of `removed` would have to go.
    """
    hulls = [_lower_hull(removed, layer.tolist()) for layer in costs]
    widths = [intermediate_size] * len(costs)
    smallest = intermediate_size - removed[-1]

    def next_width(layer: int) -> int:
        return (widths[layer] - 1) // multiple_of * multiple_of

    def next_step(layer: int) -> tuple[float, int]:
        """What the layer's next neurons cost, each, and the layer."""
        steps = intermediate_size - np.array([widths[layer], next_width(layer)])
        now, then = np.interp(steps, *hulls[layer])
        return (then - now) / (widths[layer] - next_width(layer)), layer

    heap = [next_step(layer) for layer in range(len(costs)) if next_width(layer) >= smallest]
    heapq.heapify(heap)
    while sum(widths) > width * len(costs):
        if not heap:
            raise ValueError(
                f"a width of {width} on the average leaves layers with less than {smallest} of their"
                f" {intermediate_size} neurons: by sensitivity no more can go"
            )
        _, layer = heapq.heappop(heap)
        widths[layer] = next_width(layer)
        if next_width(layer) >= smallest:
            heapq.heappush(heap, next_step(layer))
    return widths


def shrunk_costs(costs: Sequence[torch.Tensor], kept_share: float) -> list[torch.Tensor]:
    """Costs of layers drawn towards their mean, in the logarithm: cost^s mean^(1 - s), s the share of neurons that stay.

    What a layer costs is known with all others whole. The more goes from these, too, the less it tells: layers that could
    stand in for each other look cheap one by one, and to narrow them all is not.

    Args:
        costs: of each layer float32 `[P]`, at the same numbers of removed neurons.
        kept_share: s, between 0 and 1.

    Returns:
        Of each layer float32 `[P]`, on the CPU.
    """
    stacked = torch.stack([layer.cpu() for layer in costs])  # [layers, P]
    return list(stacked**kept_share * stacked.mean(0) ** (1 - kept_share))


def select(scores: torch.Tensor, width: int) -> torch.Tensor:
    """The `width` neurons of highest score, as ascending indices.

    The choice is made on the CPU whatever the device of the scores, so that equal scores give equal neurons everywhere.

    Args:
        scores: float32 `[I]`.
        width: how many to keep, 1 to I.

    Returns:
        int64 `[width]` on the CPU, ascending.
    """
    return torch.topk(scores.cpu(), width).indices.sort().values
