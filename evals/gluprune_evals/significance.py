"""What the noise allows to say: paired changes between two scores, and correlations between two tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Change:
    """A score against the dense model's on the same documents.

    relative: of the score. low, high: the 95 % confidence interval of the change, in units of `difference`.
    difference: of the means; of the logarithms for perplexities.
    """

    relative: float
    difference: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds no change at all."""
        return self.low <= 0 <= self.high


def paired_change(dense: Sequence, other: Sequence, metric: str) -> Change:
    """The change from one model to another over the same documents, by Student's t on the differences.

    Args:
        dense, other: a value a document: scores; log-likelihoods where the metric is a perplexity; pairs
            (log-likelihood, words) where it is one of words.
        metric: lm-eval's name.

    Raises:
        ValueError: the documents are not as many.
    """
    if len(dense) != len(other):
        raise ValueError(f"{len(dense)} documents against {len(other)}: not the same ones")
    if "perplexity" not in metric:
        before, after = math.fsum(dense) / len(dense), math.fsum(other) / len(other)
        low, high = _interval([b - a for a, b in zip(dense, other)], len(dense))
        return Change(after / before - 1 if before else math.nan, after - before, low, high)
    if isinstance(dense[0], (list, tuple)):
        words = [weight for _, weight in dense]
        losses = [(-a, -b) for (a, _), (b, _) in zip(dense, other)]
    else:
        words, losses = [1] * len(dense), [(-a, -b) for a, b in zip(dense, other)]
    total = sum(words)
    difference = math.fsum(b - a for a, b in losses) / total  # of the logarithms of the perplexities
    # Linearised ratio of sums: what a document's loss changed beyond its share of the words.
    residuals = [b - a - difference * weight for (a, b), weight in zip(losses, words)]
    low, high = _interval(residuals, total)
    return Change(math.exp(difference) - 1, difference, low + difference, high + difference)


def _interval(values: list[float], total: float) -> tuple[float, float]:
    """Confidence interval of sum(values) / total."""
    count = len(values)
    centre = math.fsum(values) / total
    if count < 2:
        return -math.inf, math.inf
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    half = stats.t.ppf((1 + LEVEL) / 2, count - 1) * deviation * math.sqrt(count) / total
    return centre - half, centre + half


def is_beyond_chance(marked: int, total: int) -> bool:
    """Whether `marked` changes in one direction, of `total` tested at 95 %, are more than chance gives at that level.

    Binomial, as if the changes were independent; those of one model at several ratios are less than that.
    """
    return marked > 0 and stats.binom.sf(marked - 1, total, (1 - LEVEL) / 2) < 1 - LEVEL


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
    """None where fewer than four pairs or a constant leave nothing to say."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values against {len(y)}")
    if len(x) < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    found = stats.pearsonr(x, y)
    interval = found.confidence_interval(LEVEL)
    return Correlation(len(x), float(found.statistic), float(found.pvalue), float(interval.low), float(interval.high))
