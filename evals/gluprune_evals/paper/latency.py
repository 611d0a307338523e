"""The published latencies and energies of the width-pruning study (arXiv 2512.22671), explained: `gluprune report --published`.

The figures are in `data/published_inference.json`, which names their source. All runs are used; the published means leave
out runs of some configurations. What is called time to first token there is the time of the whole `generate()` call, with a
length of output that the model chooses.
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
class Configuration:
    """One model and workload: the sums over its runs, a prompt.

    tokens, seconds, joules: of a prompt (with batches, its share); ttlt: published seconds, None with batches.
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
        return Cost(self.tokens, self.seconds / self.tokens)

    @property
    def energy(self) -> Cost:
        return Cost(self.tokens, self.joules / self.tokens)

    @property
    def is_odd(self) -> bool:
        return self.width % 2 == 1


@cache
def _document() -> dict:
    return json.loads((files("gluprune_evals.paper") / "data" / "published_inference.json").read_text(encoding="utf-8"))


def _runs() -> list[dict]:
    document = _document()
    return [dict(zip(document["columns"], row)) for row in document["rows"]]


def configurations() -> list[Configuration]:
    """All configurations of the study, of each model and workload the dense one first."""
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
            Configuration(
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


def dense_of(configuration: Configuration) -> Configuration:
    """The dense model of the same workload."""
    same = (configuration.model, configuration.workload)
    return next(c for c in configurations() if (c.model, c.workload) == same and c.percent == 0)


def predicted_ttlt(configuration: Configuration) -> float:
    """Seconds to the last token, from the dense model's time per token and the number of tokens alone."""
    return configuration.tokens * dense_of(configuration).latency.each


def prediction_errors() -> list[float]:
    """Relative error of `predicted_ttlt` against the published TTLT, of every pruned configuration that has one."""
    pruned = [c for c in configurations() if c.percent and c.ttlt is not None]
    return [predicted_ttlt(c) / c.ttlt - 1 for c in pruned]


def odd_excess(model: str, workload: str) -> dict[int, float]:
    """By odd width, the energy of a token over that on the straight line through the even widths, less 1."""
    own = [c for c in configurations() if (c.model, c.workload) == (model, workload)]
    even = [c for c in own if not c.is_odd]
    slope, start = statistics.linear_regression([c.width for c in even], [c.energy.each for c in even])
    return {c.width: c.energy.each / (start + slope * c.width) - 1 for c in own if c.is_odd}


def carbon_share() -> tuple[float, float]:
    """Least and largest ratio of the published kWh to those that CodeCarbon counted, over the runs that have both."""
    ratios = [run["energy_raw_kwh"] / run["codecarbon_kwh"] for run in _runs() if run["codecarbon_kwh"]]
    return min(ratios), max(ratios)


def write(out: str | Path) -> Path:
    """Write the table and the picture into a folder, which is made if need be; returns the table's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _plot(out / PICTURE)
    write_file(out / TABLE, [_markdown().encode()])
    return out / TABLE


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _groups(is_batched: bool) -> list[tuple[str, str]]:
    """Models and workloads with batches, or without."""
    return list(dict.fromkeys((c.model, c.workload) for c in configurations() if (c.batch > 1) == is_batched))


def _range(is_batched: bool) -> str:
    found = [value for group in _groups(is_batched) for value in odd_excess(*group).values()]
    return f"{_percent(min(found))} to {_percent(max(found))}, median {_percent(statistics.median(found))}"


def _models() -> list[str]:
    return list(dict.fromkeys(c.model for c in configurations()))


def _average(model: str, percent: int) -> tuple[float, float, float]:
    """Mean published TTLT of the workloads at batch 1 over the dense model's, less 1: all, by output length, per token."""
    own = [c for c in configurations() if (c.model, c.percent) == (model, percent) and c.ttlt is not None]
    base = sum(dense_of(c).latency.total for c in own)
    parts = [split(dense_of(c).latency, c.latency) for c in own]
    lengths, tokens = (sum(getattr(part, name) for part in parts) / base for name in ("output_length", "per_token"))
    return lengths + tokens, lengths, tokens


def _markdown() -> str:
    source, errors = _document()["source"], prediction_errors()
    absolute = [abs(error) for error in errors]
    low, high = carbon_share()
    lines = [
        "# The published latencies and energies, explained",
        "",
        f"{source['paper']}; measured there on {source['hardware']}. Figures from {source['repository']}, commit"
        f" {source['commit'][:10]} ({source['licence']}). This page and its picture: `gluprune report --published`.",
        "",
        f"![what the published differences are made of]({PICTURE})",
        "",
        "## Latency: the models write more, not slower",
        "",
        "What was published as latency is the time of the whole `generate()` call (TTLT), and the pruned models stop later."
        " **TTLT predicted from the dense model's time per token and the number of tokens alone, against the published TTLT of"
        f" every pruned configuration: median error {statistics.median(absolute):.1%}, largest {max(absolute):.1%}**"
        f" ({len(errors)} configurations). The first token cannot be told apart in these data; it is in the time per token.",
        "",
        "Mean of the three workloads at batch 1, against the dense model:",
        "",
        "| model | pruned | TTLT | by output length | by time per token |",
        "|---|--:|--:|--:|--:|",
    ]
    percents = sorted({c.percent for c in configurations()} - {0})
    for model in _models():
        for percent in percents:
            lines.append(f"| {model} | {percent} % | {' | '.join(map(_percent, _average(model, percent)))} |")
    lines += [
        "",
        "Every configuration at batch 1 (energy: see the note on units below):",
        "",
        "| model | workload | pruned | tokens a prompt | TTLT, ms | predicted, ms | error | TTLT against dense |"
        " by output length | by time per token | J a prompt against dense | by output length | by J per token |",
        "|---|---|--:|" + "--:|" * 10,
    ]
    for c in configurations():
        if c.ttlt is None or not c.percent:
            continue
        dense = dense_of(c)
        time, energy = split(dense.latency, c.latency), split(dense.energy, c.energy)
        cells = [
            f"{c.tokens:.1f}",
            f"{1e3 * c.ttlt:.0f}",
            f"{1e3 * predicted_ttlt(c):.0f}",
            _percent(predicted_ttlt(c) / c.ttlt - 1),
            *(_percent(part / dense.latency.total) for part in (time.total, time.output_length, time.per_token)),
            *(_percent(part / dense.energy.total) for part in (energy.total, energy.output_length, energy.per_token)),
        ]
        lines.append(f"| {c.model} | {c.workload} | {c.percent} % | {' | '.join(cells)} |")
    lines += [
        "",
        "## Energy: odd widths pay at batch 8",
        "",
        "Joules per token as published, idle subtracted. Odd widths in bold; behind them, what they take beyond the straight line"
        " through the even widths.",
        "",
    ]
    shown = {c.percent: c.width for c in configurations()}
    lines += [
        "| model | workload | " + " | ".join(f"{width}" for width in shown.values()) + " |",
        "|---|---|" + "--:|" * len(shown),
    ]
    for model, workload in _groups(is_batched=True):
        own = [c for c in configurations() if (c.model, c.workload) == (model, workload)]
        excess = odd_excess(model, workload)
        cells = [
            f"**{c.energy.each:.4f}** ({_percent(excess[c.width])})" if c.is_odd else f"{c.energy.each:.4f}"
            for c in own
        ]
        lines.append(f"| {model} | {workload} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Excess of the odd widths at batch 8: {_range(True)}. The same at batch 1, where launches bound the decoding:"
        f" {_range(False)}.",
        "",
        "**Units.** What is published as kWh (and from it as joules) is what CodeCarbon's `stop()` returns, and that is kilograms"
        " of CO2. Where the repository holds CodeCarbon's own kWh beside it (the runs of the 1B model), the published figure is"
        f" {low:.4f} to {high:.4f} of it in every run. Ratios between configurations are not touched by that; joules there"
        f" are to be multiplied by {1 / high:.2f}. For the 3B model the factor is not known.",
    ]
    return "\n".join(lines) + "\n"


def _plot(path: Path) -> None:
    from matplotlib.figure import Figure

    models = _models()
    figure = Figure(figsize=(11.5, 7.6), layout="constrained")
    for model, (latency, energy) in zip(models, figure.subplots(len(models), 2, squeeze=False)):
        _plot_latency(latency, model)
        _plot_energy(energy, model)
    source = _document()["source"]
    figure.suptitle(f"Published runs of arXiv 2512.22671 ({source['hardware']}), explained", fontsize="medium")
    figure.savefig(path, dpi=110)


def _plot_latency(axes, model: str) -> None:
    percents = sorted({c.percent for c in configurations()} - {0})
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
    axes.set(xlabel="neurons removed", ylabel="TTLT against dense, %", title=f"{model}, batch 1: longer, not slower")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", fontsize="small", markerscale=0.4)


def _plot_energy(axes, model: str) -> None:
    workloads = [workload for owner, workload in _groups(is_batched=True) if owner == model]
    for index, workload in enumerate(workloads):
        own = [c for c in configurations() if (c.model, c.workload) == (model, workload)]
        for is_odd, style in (
            (False, {"marker": "o", "ms": 5}),
            (True, {"marker": "x", "ms": 7, "mew": 2, "ls": "none"}),
        ):
            part = [c for c in own if c.is_odd == is_odd]
            relative = [c.energy.each / own[0].energy.each for c in part]
            label = None if is_odd else workload
            axes.plot([c.width for c in part], relative, color=f"C{index}", label=label, lw=1, **style)
    axes.plot([], [], "x", color="grey", ms=7, mew=2, label="odd widths")
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.invert_xaxis()
    axes.set(
        xlabel="intermediate size", ylabel="J per token, dense = 1", title=f"{model}, batch 8: what odd widths cost"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
