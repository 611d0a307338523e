"""The results of one model under one recipe, compared with the dense model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gluprune_evals.configuration import UNCHANGED
from gluprune_evals.harness import Result
from gluprune_evals.significance import Correlation, PairedChange, paired_change, pearson
from gluprune_evals.tasks import TASKS

DENSE = "dense"
BETTER, WORSE, NOISE = "▲", "▼", "≈"


@dataclass(frozen=True)
class Series:
    """The results of one model under one recipe, including the dense ones: task -> pruning ratio -> result."""

    model: str
    recipe: str
    results: dict[str, dict[float, Result]]

    @property
    def title(self) -> str:
        """The model, and the recipe if it was pruned here."""
        return f"{self.model}, {self.recipe}" if self.ratios else self.model

    @property
    def ratios(self) -> list[float]:
        """The pruning ratios, without that of the dense model."""
        return sorted({ratio for found in self.results.values() for ratio in found} - {0.0})

    def change(self, task: str, ratio: float) -> PairedChange | None:
        """Return the change from the dense model; None where either result is missing."""
        found = self.results.get(task, {})
        if 0.0 not in found or ratio not in found:
            return None
        return paired_change(found[0.0].per_document, found[ratio].per_document, found[ratio].metric)

    def mark(self, task: str, ratio: float) -> str:
        """Return the mark of a score; empty for the dense model and where a result is missing."""
        change = self.change(task, ratio) if ratio else None
        return mark(task, change) if change else ""

    def expansion_ratio(self, ratio: float) -> float:
        """Return the expansion ratio at a pruning ratio."""
        return next(found[ratio] for found in self.results.values() if ratio in found).configuration["expansion_ratio"]


def mark(task: str, change: PairedChange) -> str:
    """Return the mark of a change of the score of a task."""
    if change.is_noise:
        return NOISE
    return WORSE if (change.difference > 0) == TASKS[task].lower_is_better else BETTER


def all_series(results: Sequence[Result]) -> list[Series]:
    """Return one series for each model and recipe; a model that was never pruned has one of its own."""
    series = []
    for model in dict.fromkeys(result.model for result in results):
        own = [result for result in results if result.model == model]
        names = [name for result in own if (name := _recipe(result))]
        for recipe in list(dict.fromkeys(names)) or [UNCHANGED]:
            chosen: dict[str, dict[float, Result]] = {}
            for result in own:
                if _recipe(result) in (None, recipe):
                    chosen.setdefault(result.task, {})[result.configuration["ratio"]] = result
            series.append(Series(model, recipe, {task: chosen[task] for task in TASKS if task in chosen}))
    return series


def _recipe(result: Result) -> str | None:
    name, multiple = result.configuration["recipe"], result.configuration["multiple_of"]
    return f"{name}, multiples of {multiple}" if name and multiple > 1 else name


def mark_counts(series: Series, tasks: Sequence[str]) -> dict[str, int]:
    """Return how many scores of these tasks, at all ratios, have each mark."""
    marks = [series.mark(task, ratio) for task in tasks for ratio in series.ratios]
    return {mark: marks.count(mark) for mark in (BETTER, WORSE, NOISE)}


def correlate(first: str, second: str, x: dict[float, float], y: dict[float, float]) -> Correlation | None:
    """Correlate two tasks over the ratios at which both have a score, with the logarithms of perplexities."""

    def axis(task: str, values: dict[float, float]) -> list[float]:
        shared = sorted(x.keys() & y.keys())
        return [math.log(values[r]) if TASKS[task].lower_is_better else values[r] for r in shared]

    return pearson(axis(first, x), axis(second, y))


def series_correlation(series: Series, first: str, second: str) -> Correlation | None:
    """Correlate two tasks over the ratios of a series and the dense model."""
    values = ({r: result.value for r, result in series.results.get(task, {}).items()} for task in (first, second))
    return correlate(first, second, *values)
