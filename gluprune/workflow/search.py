"""The search for the narrowest width whose loss stays within a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# The loss (nats per token above dense) at width 0 that the first guess assumes: a straight line from there to 0 at the
# dense width. Losses on record are close to straight lines of this slope (evals/results/quality.md).
_ASSUMED_LOSS = 1.3


def narrowest(widths: Sequence[int], dense_width: int, limit: float, measure: Callable[[int], float]) -> int | None:
    """Return the narrowest of some widths whose loss is at most `limit`, if the loss falls with the width.

    Guesses by linear interpolation and by bisection take turns, so that few widths are measured: the result, and the
    next narrower one.

    Args:
        widths: Ascending, all below `dense_width`.
        dense_width: The width with loss 0.
        limit: The allowed loss, above 0.
        measure: Returns the loss of a width.

    Returns:
        The width; None if all of them lose more.
    """
    # Open interval: the loss is above the limit at the left end and not at the right end.
    left, right = (0, max(_ASSUMED_LOSS, 2 * limit)), (dense_width, 0.0)
    chosen, interpolate = None, True
    while between := [width for width in widths if left[0] < width < right[0]]:
        guess: float = between[len(between) // 2]
        if interpolate:
            guess = right[0] - (right[0] - left[0]) * (limit - right[1]) / (left[1] - right[1])
        interpolate = not interpolate
        width = min(between, key=lambda candidate: abs(candidate - guess))
        point = width, measure(width)
        if point[1] <= limit:
            chosen, right = width, point
        else:
            left = point
    return chosen
