"""The scores of a study as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from gluprune.reports.plots import number
from gluprune_evals.harness import Result
from gluprune_evals.series import BETTER, DENSE, NOISE, WORSE, Series, all_series, mark
from gluprune_evals.significance import paired_change
from gluprune_evals.tasks import TASKS

STANDARD_ERROR = "± is one standard error of the score."
_MARKS = f"on the same documents, at 95 %: {BETTER} better, {WORSE} worse, {NOISE}"
LEGEND = f"{STANDARD_ERROR} The marks compare with the dense model {_MARKS} **within the noise**."


def summary(results: Sequence[Result]) -> str:
    """Return the scores of all models: those pruned in the study by ratio, the others side by side.

    Args:
        results: Of one study.
    """
    every = all_series(results)
    pruned = [series for series in every if series.ratios]
    unchanged = [series for series in every if not series.ratios]
    lines: list[str] = []
    for series in pruned:
        lines += ["", f"{series.title}: {results[0].limits}", "", *aligned(_by_ratio(series), names=2)]
    legend = [LEGEND.replace("**", "")] if pruned else []
    if unchanged:
        ordered = by_size(unchanged)
        title = ", ".join(series.title for series in ordered)
        lines += ["", f"{title}: {results[0].limits}", "", *aligned(_side_by_side(ordered), names=2)]
        if len(ordered) > 1:
            legend += [comparison_legend(ordered[0])]
    return "\n".join([*lines, "", *(legend or [STANDARD_ERROR])])


def by_size(models: Sequence[Series]) -> list[Series]:
    """Return models that were not pruned in the study, the one with the most parameters first."""
    return sorted(models, key=_parameters, reverse=True)


def comparison_legend(first: Series) -> str:
    """Return what the cells of `compared_scores` mean."""
    return f"{STANDARD_ERROR} The marks compare with {first.model} {_MARKS} within the noise."


def _by_ratio(series: Series) -> list[list[str]]:
    ratios = [0.0, *series.ratios]
    rows = [["task", "metric", *(f"{ratio:.0%}" if ratio else DENSE for ratio in ratios)]]
    for task, found in series.results.items():
        cells = [f"{score(found[r])} {series.mark(task, r)}".rstrip() if r in found else "–" for r in ratios]
        rows.append([task, _metric(task), *cells])
    return rows


def _side_by_side(models: Sequence[Series]) -> list[list[str]]:
    """Rows of scores, one column for each model, with marks that compare with the first."""
    rows = [["task", "metric", *([series.model for series in models] if len(models) > 1 else ["score"])]]
    return rows + [[result.task, _metric(result.task), *cells] for result, cells in compared_scores(models)]


def compared_scores(models: Sequence[Series]) -> list[tuple[Result, list[str]]]:
    """Return, for every task, a result of it, and the score of each model with a mark that compares it with the first.

    Args:
        models: Not pruned in the study.
    """
    rows = []
    for task in TASKS:
        found = [series.results.get(task, {}).get(0.0) for series in models]
        if present := list(filter(None, found)):
            rows.append((present[0], [_compared(result, found[0]) for result in found]))
    return rows


def _compared(result: Result | None, first: Result | None) -> str:
    if result is None:
        return "–"
    if first is None or first is result:
        return score(result)
    change = paired_change(first.per_document, result.per_document, result.metric)
    return f"{score(result)} {mark(result.task, change)}"


def _parameters(series: Series) -> int:
    return next(found[0.0] for found in series.results.values()).configuration["parameters"]


def _metric(task: str) -> str:
    return TASKS[task].metric.partition(",")[0]


def aligned(rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """Return the rows of a table as lines: the first `names` columns on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < names else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def score(result: Result) -> str:
    """Return the reported figure of a result and its standard error."""
    value = number(result.value) if TASKS[result.task].lower_is_better else f"{result.value:.3f}"
    if result.stderr is None:
        return value
    return f"{value} ±{number(result.stderr) if TASKS[result.task].lower_is_better else f'{result.stderr:.3f}'}"
