"""The plots of a study. Every function writes one PNG file."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from gluprune.measure.records import Record
from gluprune.reports.plots import readable
from gluprune_evals.findings import shows_more_than_noise
from gluprune_evals.paper import scores
from gluprune_evals.series import Series
from gluprune_evals.significance import Correlation
from gluprune_evals.tasks import TASKS


def _panels(count: int, columns: int, width: float, height: float, margin: float):
    """A figure of `count` panels, each `width` x `height` inches, with a `margin` for title and legend."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, margin + height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for empty in panels[count:]:
        empty.set_axis_off()
    return figure, list(panels[:count])


def _task_panels(own: list[Series]):
    """A figure, a panel for each task that shows more than noise (for all, if none does), and a note on the others."""
    tasks = list(dict.fromkeys(task for series in own for task in series.results))
    drawn = [task for task in tasks if any(shows_more_than_noise(series, task) for series in own)] or tasks
    figure, panels = _panels(len(drawn), columns=2 if len(drawn) == 4 else 3, width=4.2, height=3.0, margin=1.1)
    left = ", ".join(task for task in tasks if task not in drawn)
    note = f". Not drawn, since changes are within the noise or cannot show: {left}" if left else ""
    return figure, dict(zip(drawn, panels, strict=True)), note


def _titled(axes, task: str, ratio_axis: str = "") -> None:
    """Label a panel; `ratio_axis` names the axis ("x" or "y") of shares, which are shown in percent."""
    from matplotlib.ticker import PercentFormatter

    spec = TASKS[task]
    for name in ratio_axis:
        getattr(axes, f"{name}axis").set_major_formatter(PercentFormatter(1))
    axes.set_title(f"{task} ({'lower' if spec.lower_is_better else 'higher'} is better)", fontsize="small")
    axes.tick_params(labelsize="x-small")
    axes.grid(alpha=0.3)


def capability(own: list[Series], path: Path) -> None:
    """Draw each task's score against the expansion ratio: one line per recipe, in a band of one standard error."""
    figure, panels, note = _task_panels(own)
    for task, axes in panels.items():
        for index, series in enumerate(own):
            found = dict(sorted(series.results.get(task, {}).items()))
            x = [result.configuration["expansion_ratio"] for result in found.values()]
            errors = [result.stderr or 0.0 for result in found.values()]
            values = [result.value for result in found.values()]
            # The axis of perplexities is logarithmic: keep the band above zero.
            low = [value - min(error, 0.9 * value) for value, error in zip(values, errors, strict=True)]
            high = [value + error for value, error in zip(values, errors, strict=True)]
            axes.plot(x, values, color=f"C{index}", marker="o", ms=3.5, lw=1.6, label=series.recipe)
            axes.fill_between(x, low, high, color=f"C{index}", alpha=0.15, lw=0)
        if TASKS[task].lower_is_better:
            axes.set_yscale("log")
        elif TASKS[task].chance is not None:
            axes.axhline(TASKS[task].chance, color="grey", linestyle=":", label="chance")
        _titled(axes, task, "" if TASKS[task].lower_is_better else "y")
        axes.set_xlabel("expansion ratio", fontsize="x-small")
        axes.invert_xaxis()
    _finish(figure, panels, f"{own[0].model}: score against expansion ratio (bands: one standard error){note}", path)


def against_published(own: list[Series], path: Path) -> None:
    """Draw each task's score divided by the dense model's against the share of neurons removed, and those published."""
    figure, panels, note = _task_panels(own)
    for task, axes in panels.items():
        axes.axhline(1, color="black", lw=0.8)
        for index, series in enumerate(own):
            found = dict(sorted(series.results.get(task, {}).items()))
            dense = found[0.0].value if 0.0 in found else 0.0
            if dense:
                values = [result.value / dense for result in found.values()]
                axes.plot(list(found), values, marker="o", ms=3.5, lw=1.6, color=f"C{index}", label=series.title)
        for model, style in zip(scores.MODELS, ("--", "-.", ":"), strict=True):
            values = scores.series(model, task)
            if values:
                shares = [value / values[0.0] for value in values.values()]
                axes.plot(list(values), shares, style, color="grey", label=f"{model}, published")
        if TASKS[task].lower_is_better:
            axes.set_yscale("log")
        _titled(axes, task, "x" if TASKS[task].lower_is_better else "xy")
        axes.set_xlabel("neurons removed", fontsize="x-small")
    _finish(figure, panels, f"Score over that of the dense model against the share of neurons removed{note}", path)


def cost(own: list[Series], costs: dict[int, Record], words: str, path: Path) -> bool:
    """Draw each task's score against a cost measured at the same widths.

    Returns:
        False, without a file, where fewer than two widths were measured.
    """
    points = {  # recipe -> task -> (cost, score)
        series.recipe: {
            task: sorted(
                (costs[width].p50, result.value)
                for result in found.values()
                if (width := result.configuration["intermediate_size"]) in costs
            )
            for task, found in series.results.items()
        }
        for series in own
    }
    if max((len(pairs) for of in points.values() for pairs in of.values()), default=0) < 2:
        return False
    record = next(iter(costs.values()))
    scale, unit = readable([cost.p50 for cost in costs.values()], record.unit)
    figure, panels, note = _task_panels(own)
    for task, axes in panels.items():
        for index, (recipe, of) in enumerate(points.items()):
            if of.get(task):
                x, y = zip(*of[task], strict=True)
                axes.plot(
                    [scale * value for value in x], y, marker="o", ms=3.5, lw=1.2, color=f"C{index}", label=recipe
                )
        if TASKS[task].lower_is_better:
            axes.set_yscale("log")
        _titled(axes, task, "" if TASKS[task].lower_is_better else "y")
        axes.set_xlabel(f"{words}, {unit}", fontsize="x-small")
    how = ", ".join(f"{key} {value}" for key, value in record.shape.items() if key not in ("model", "I", "H"))
    title = f"{own[0].model}: score against {words}, by {record.provider}, {how or record.what},"
    title += f" {record.hardware}{note}"
    _finish(figure, panels, title, path)
    return True


def correlations(table: dict[tuple[str, str], dict[tuple[str, str], Correlation]], path: Path) -> None:
    """Draw a matrix of r for each series; pairs with p < 0.05 have their figure printed."""
    figure, panels = _panels(len(table), columns=3, width=5.4, height=4.9, margin=0.0)
    for axes, ((model, recipe), pairs) in zip(panels, table.items(), strict=True):
        tasks = [task for task in TASKS if any(task in pair for pair in pairs)]
        grid = [[math.nan] * len(tasks) for _ in tasks]
        for (first, second), found in pairs.items():
            x, y = tasks.index(first), tasks.index(second)
            grid[y][x] = grid[x][y] = found.r
            if found.p < 0.05:
                color = "white" if abs(found.r) > 0.6 else "black"
                text = {"ha": "center", "va": "center", "fontsize": 6, "color": color}
                axes.text(x, y, f"{found.r:.2f}", **text)
                axes.text(y, x, f"{found.r:.2f}", **text)
        image = axes.imshow(grid, cmap="RdBu", vmin=-1, vmax=1)
        short = [task.replace("leaderboard_", "").replace("_openai", "").replace("truthfulqa", "tqa") for task in tasks]
        axes.set_xticks(range(len(tasks)), short, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(tasks)), short, fontsize=7)
        axes.set_title(textwrap.fill(f"{model}, {recipe}", 50), fontsize="small")
    figure.colorbar(image, ax=panels, shrink=0.6, label="Pearson's r (figures where p < 0.05)")
    figure.savefig(path, dpi=110)


def _columns(figure, labels) -> int:
    """Return how many entries of a legend fit beside each other: about 14 small characters an inch, and the lines."""
    widest = max(map(len, labels)) + 8
    return max(1, min(len(labels), int(14 * figure.get_figwidth() / widest)))


def _finish(figure, panels, title: str, path: Path) -> None:
    handles: dict[str, object] = {}
    for axes in panels.values():
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=_columns(figure, handles), fontsize="small"
    )
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize="medium")
    figure.savefig(path, dpi=110)
