"""`gluprune report --published`: the published latencies and energies of arXiv 2512.22671, explained.

The figures are in `data/published_inference.json`, which names their source. All runs are used; the published means
omit runs of some configurations. What the paper calls time to first token is the time of the whole `generate()` call,
with an output length that the model chooses.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from gluprune.io.atomic import write_file
from gluprune.reports.breakdown import Cost, split

TABLE, PICTURE = "published.md", "published.png"


@dataclass(frozen=True)
class PublishedResult:
    """One model, width and workload: means over all prompts of all runs.

    Attributes:
        model: Name of the model.
        percent: Share of the neurons removed.
        width: Intermediate size.
        workload: Data set and batch.
        batch: Prompts per batch.
        tokens: Generated tokens for each prompt.
        seconds: For each prompt (in a batch, its share).
        joules: For each prompt (in a batch, its share).
        ttlt: Published seconds to the last token. None with batches.
    """

    model: str
    percent: int
    width: int
    workload: str
    batch: int
    tokens: float
    seconds: float
    joules: float
    ttlt: float | None

    @property
    def latency(self) -> Cost:
        """Seconds of a prompt."""
        return Cost(self.tokens, self.seconds / self.tokens)

    @property
    def energy(self) -> Cost:
        """Joules of a prompt."""
        return Cost(self.tokens, self.joules / self.tokens)

    @property
    def is_odd(self) -> bool:
        """Whether the width is an odd number."""
        return self.width % 2 == 1


@cache
def _document() -> dict:
    return json.loads((files("gluprune_evals.paper") / "data" / "published_inference.json").read_text(encoding="utf-8"))


def _runs() -> list[dict]:
    document = _document()
    return [dict(zip(document["columns"], row, strict=True)) for row in document["rows"]]


def published_results() -> list[PublishedResult]:
    """Return all results of the paper; for each model and workload, the dense one comes first."""
    document = _document()
    grouped: dict[tuple, list[dict]] = {}
    for run in _runs():
        grouped.setdefault((run["model"], run["workload"], run["pruned_percent"]), []).append(run)
    found = []
    for (model, workload, percent), runs in sorted(
        grouped.items(), key=lambda item: (item[0][0], item[0][1], item[0][2])
    ):
        batch, prompts = (document["workloads"][workload][name] for name in ("batch", "prompts"))
        dense = document["intermediate_size"]
        count = prompts * len(runs)
        found.append(
            PublishedResult(
                model,
                percent,
                dense - int(percent / 100 * dense),
                f"{workload.partition('_')[0]} b{batch}",
                batch,
                sum(run["tokens"] for run in runs) / count,
                sum(run["tokens"] / run["tokens_per_second"] for run in runs) / count,
                sum(run["tokens"] * run["joules_per_token"] for run in runs) / count,
                None if batch > 1 else statistics.mean(run["ttlt_ms"] for run in runs) / 1e3,
            )
        )
    return found


def dense_of(result: PublishedResult) -> PublishedResult:
    """Return the result of the dense model on the same workload."""
    return next(r for r in _of(result.model, result.workload) if r.percent == 0)


def _of(model: str, workload: str) -> list[PublishedResult]:
    return [r for r in published_results() if (r.model, r.workload) == (model, workload)]


def predicted_ttlt(result: PublishedResult) -> float:
    """Return seconds to the last token, from only the dense model's time per token and the number of tokens."""
    return result.tokens * dense_of(result).latency.each


def prediction_errors() -> list[float]:
    """Return the relative error of `predicted_ttlt` for every pruned model with a published TTLT."""
    return [predicted_ttlt(r) / r.ttlt - 1 for r in published_results() if r.percent and r.ttlt is not None]


def odd_excess(model: str, workload: str) -> dict[int, float]:
    """Return odd width -> energy of a token divided by that on the straight line through the even widths, minus 1."""
    own = _of(model, workload)
    even = [c for c in own if not c.is_odd]
    slope, start = statistics.linear_regression([c.width for c in even], [c.energy.each for c in even])
    return {c.width: c.energy.each / (start + slope * c.width) - 1 for c in own if c.is_odd}


def carbon_share() -> tuple[float, float]:
    """Return the smallest and largest ratio of the published kWh to CodeCarbon's, over the runs that have both."""
    ratios = [run["energy_raw_kwh"] / run["codecarbon_kwh"] for run in _runs() if run["codecarbon_kwh"]]
    return min(ratios), max(ratios)


def write(out: str | Path) -> Path:
    """Write the table and the plot into a folder, created if it does not exist; return the table's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _plot(out / PICTURE)
    write_file(out / TABLE, [_markdown().encode()])
    return out / TABLE


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _groups(is_batched: bool) -> list[tuple[str, str]]:
    """Models and workloads with batches, or without."""
    return list(dict.fromkeys((c.model, c.workload) for c in published_results() if (c.batch > 1) == is_batched))


def _range(is_batched: bool) -> str:
    found = [value for group in _groups(is_batched) for value in odd_excess(*group).values()]
    return f"{_percent(min(found))} to {_percent(max(found))}, median {_percent(statistics.median(found))}"


def _models() -> list[str]:
    return list(dict.fromkeys(c.model for c in published_results()))


def _percents() -> list[int]:
    return sorted({r.percent for r in published_results()} - {0})


def _average(model: str, percent: int) -> tuple[float, float, float]:
    """Mean published TTLT at batch 1 divided by the dense model's, minus 1: total, by output length, per token."""
    own = [c for c in published_results() if (c.model, c.percent) == (model, percent) and c.ttlt is not None]
    base = sum(dense_of(c).latency.total for c in own)
    parts = [split(dense_of(c).latency, c.latency) for c in own]
    lengths, tokens = (sum(getattr(part, name) for part in parts) / base for name in ("output_length", "per_token"))
    return lengths + tokens, lengths, tokens


def _markdown() -> str:
    source = _document()["source"]
    lines = [
        "# The published latencies and energies, explained",
        "",
        f"{source['paper']}; measured there on {source['hardware']}. Figures from {source['repository']}, commit"
        f" {source['commit'][:10]} ({source['licence']}). This page and its picture: `gluprune report --published`.",
        "",
        f"![what the published differences consist of]({PICTURE})",
        "",
        *_latency_section(),
        "",
        *_energy_section(),
    ]
    return "\n".join(lines) + "\n"


def _latency_section() -> list[str]:
    errors = prediction_errors()
    absolute = [abs(error) for error in errors]
    lines = [
        "## Latency: the models write more, not slower",
        "",
        "What was published as latency is the time of the whole `generate()` call (TTLT), and the pruned models stop"
        " later. **TTLT predicted from only the dense model's time per token and the number of tokens, against the"
        f" published TTLT of every pruned configuration: median error {statistics.median(absolute):.1%}, largest"
        f" {max(absolute):.1%}** ({len(errors)} configurations). The first token cannot be separated in these data; it"
        " is part of the time per token.",
        "",
        "Mean of the three workloads at batch 1, against the dense model:",
        "",
        "| model | pruned | TTLT | by output length | by time per token |",
        "|---|--:|--:|--:|--:|",
    ]
    for model in _models():
        for percent in _percents():
            lines.append(f"| {model} | {percent} % | {' | '.join(map(_percent, _average(model, percent)))} |")
    lines += [
        "",
        "Every configuration at batch 1 (energy: see the note on units below):",
        "",
        "| model | workload | pruned | tokens a prompt | TTLT, ms | predicted, ms | error | TTLT against dense |"
        " by output length | by time per token | J a prompt against dense | by output length | by J per token |",
        "|---|---|--:|" + "--:|" * 10,
    ]
    for result in published_results():
        if result.ttlt is not None and result.percent:
            cells = " | ".join(_latency_cells(result, result.ttlt))
            lines.append(f"| {result.model} | {result.workload} | {result.percent} % | {cells} |")
    return lines


def _latency_cells(result: PublishedResult, ttlt: float) -> list[str]:
    dense, predicted = dense_of(result), predicted_ttlt(result)
    time, energy = split(dense.latency, result.latency), split(dense.energy, result.energy)
    return [
        f"{result.tokens:.1f}",
        f"{1e3 * ttlt:.0f}",
        f"{1e3 * predicted:.0f}",
        _percent(predicted / ttlt - 1),
        *(_percent(part / dense.latency.total) for part in (time.total, time.output_length, time.per_token)),
        *(_percent(part / dense.energy.total) for part in (energy.total, energy.output_length, energy.per_token)),
    ]


def _energy_section() -> list[str]:
    low, high = carbon_share()
    shown = {result.percent: result.width for result in published_results()}
    lines = [
        "## Energy: odd widths cost more at batch 8",
        "",
        "Joules per token as published, idle subtracted. Odd widths in bold, with their excess over the straight line"
        " through the even widths.",
        "",
        "| model | workload | " + " | ".join(f"{width}" for width in shown.values()) + " |",
        "|---|---|" + "--:|" * len(shown),
    ]
    for model, workload in _groups(is_batched=True):
        excess = odd_excess(model, workload)
        cells = [
            f"**{r.energy.each:.4f}** ({_percent(excess[r.width])})" if r.is_odd else f"{r.energy.each:.4f}"
            for r in _of(model, workload)
        ]
        lines.append(f"| {model} | {workload} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Excess of the odd widths at batch 8: {_range(True)}. The same at batch 1, where decoding is bound by"
        f" launches: {_range(False)}.",
        "",
        "**Units.** What is published as kWh (and from it as joules) is the return value of CodeCarbon's `stop()`,"
        " which is kilograms of CO2. Where the repository has CodeCarbon's own kWh as well (the runs of the 1B model),"
        f" the published figure is {low:.4f} to {high:.4f} of it in every run. Ratios between configurations are not"
        f" affected; joules there must be multiplied by {1 / high:.2f}. For the 3B model the factor is not known.",
    ]


def _plot(path: Path) -> None:
    from matplotlib.figure import Figure

    models = _models()
    figure = Figure(figsize=(11.5, 7.6), layout="constrained")
    for model, (latency, energy) in zip(models, figure.subplots(len(models), 2, squeeze=False), strict=True):
        _plot_latency(latency, model)
        _plot_energy(energy, model)
    source = _document()["source"]
    figure.suptitle(f"Published runs of arXiv 2512.22671 ({source['hardware']}), explained", fontsize="medium")
    figure.savefig(path, dpi=110)


def _plot_latency(axes, model: str) -> None:
    from matplotlib.ticker import PercentFormatter

    percents = _percents()
    averages = [_average(model, percent) for percent in percents]
    places = range(len(percents))
    axes.bar(places, [100 * length for _, length, _ in averages], 0.6, color="C0", label="by output length")
    axes.bar(
        [place + 0.38 for place in places],
        [100 * token for _, _, token in averages],
        0.16,
        color="C1",
        label="by time per token",
    )
    axes.plot(
        places, [100 * whole for whole, _, _ in averages], "_", ms=38, mew=2, color="black", label="published TTLT"
    )
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(list(places), [f"{percent} %" for percent in percents])
    axes.set(xlabel="neurons removed", ylabel="TTLT longer than dense", title=f"{model}, batch 1: longer, not slower")
    axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    axes.set_ylim(top=1.35 * max(axes.get_ylim()))  # room for the legend
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", fontsize="small", markerscale=0.4)


def _plot_energy(axes, model: str) -> None:
    workloads = [workload for owner, workload in _groups(is_batched=True) if owner == model]
    for index, workload in enumerate(workloads):
        own = _of(model, workload)
        for is_odd, style in (
            (False, {"marker": "o", "ms": 5}),
            (True, {"marker": "x", "ms": 7, "mew": 2, "ls": "none"}),
        ):
            part = [c for c in own if c.is_odd == is_odd]
            relative = [c.energy.each / own[0].energy.each for c in part]
            label = None if is_odd else workload
            axes.plot([c.width for c in part], relative, color=f"C{index}", label=label, lw=1, **style)
    axes.plot([], [], "x", color="grey", ms=7, mew=2, label="unaligned widths")
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.invert_xaxis()
    axes.set(
        xlabel="intermediate size", ylabel="J per token, dense = 1", title=f"{model}, batch 8: cost of unaligned widths"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
