"""Statistics of scores: paired changes between two models, and correlations between two tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class PairedChange:
    """A score compared with the dense model's on the same documents.

    Attributes:
        relative: Relative change of the score.
        difference: Difference of the means; for perplexities, of their logarithms.
        low: Lower end of the 95 % confidence interval of `difference`.
        high: Upper end.
    """

    relative: float
    difference: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval contains no change."""
        return self.low <= 0 <= self.high


def paired_change(dense: Sequence, other: Sequence, metric: str) -> PairedChange:
    """Return the change from one model to another over the same documents, by Student's t on the differences.

    Args:
        dense: One value for each document: scores; log-likelihoods if the metric is a perplexity; pairs
            (log-likelihood, words) if it is a perplexity of words.
        other: The same for the other model.
        metric: lm-eval's name.

    Raises:
        ValueError: The numbers of documents differ.
    """
    if len(dense) != len(other):
        raise ValueError(f"{len(dense)} documents against {len(other)}: not the same ones")
    if "perplexity" not in metric:
        before, after = math.fsum(dense) / len(dense), math.fsum(other) / len(other)
        low, high = _interval([b - a for a, b in zip(dense, other, strict=True)], len(dense))
        return PairedChange(after / before - 1 if before else math.nan, after - before, low, high)
    if isinstance(dense[0], (list, tuple)):
        words = [weight for _, weight in dense]
        losses = [(-a, -b) for (a, _), (b, _) in zip(dense, other, strict=True)]
    else:
        words, losses = [1] * len(dense), [(-a, -b) for a, b in zip(dense, other, strict=True)]
    total = sum(words)
    difference = math.fsum(b - a for a, b in losses) / total  # of the logarithms of the perplexities
    # Linearised ratio of sums: the change of a document's loss beyond its share of the words.
    residuals = [b - a - difference * weight for (a, b), weight in zip(losses, words, strict=True)]
    low, high = _interval(residuals, total)
    return PairedChange(math.exp(difference) - 1, difference, low + difference, high + difference)


def _interval(values: list[float], total: float) -> tuple[float, float]:
    """Confidence interval of sum(values) / total."""
    count = len(values)
    centre = math.fsum(values) / total
    if count < 2:
        return -math.inf, math.inf
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * deviation * math.sqrt(count) / total
    return centre - half, centre + half


def is_beyond_chance(marked: int, total: int) -> bool:
    """Whether `marked` of `total` changes tested at 95 % in one direction are more than expected by chance.

    Binomial, as if the changes were independent; those of one model at several ratios are not quite.
    """
    return marked > 0 and float(stats.binom.sf(marked - 1, total, (1 - LEVEL) / 2)) < 1 - LEVEL


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of n pairs, its two-sided p and its 95 % confidence interval (Fisher's z)."""

    n: int
    r: float
    p: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"r = {self.r:+.3f}, p = {self.p:.3f}, 95 % from {self.low:+.2f} to {self.high:+.2f}, n = {self.n}"


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """Return the correlation; None for fewer than four pairs or a constant."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values against {len(y)}")
    if len(x) < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    found: Any = stats.pearsonr(x, y)
    interval = found.confidence_interval(LEVEL)
    return Correlation(len(x), float(found.statistic), float(found.pvalue), float(interval.low), float(interval.high))
