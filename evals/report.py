"""The report of a study: tables, findings, correlations and plots, made from its results and nothing else."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from evals import published
from evals.harness import Result
from evals.significance import Change, Correlation, is_beyond_chance, paired_change, pearson
from evals.study import Folder
from evals.tasks import FRAGILE, OTHER, ROBUST, TASKS
from gluprune.files import write_file
from gluprune.plots import number
from gluprune.records import Record

NAME = "study.md"
CORRELATIONS = "correlations.csv"
DENSE = "dense"
BETTER, WORSE, NOISE = "▲", "▼", "≈"
GROUPS = {
    FRAGILE: "published as fragile: knowledge, arithmetic, perplexity",
    ROBUST: "published as robust: instructions, multi-step reasoning, truthfulness",
    OTHER: "not in the published dichotomy",
}


@dataclass(frozen=True)
class Series:
    """The results of one model under one recipe, the dense ones included: task -> pruning ratio -> result."""

    model: str
    recipe: str
    results: dict[str, dict[float, Result]]

    @property
    def ratios(self) -> list[float]:
        return sorted({ratio for found in self.results.values() for ratio in found} - {0.0})

    def change(self, task: str, ratio: float) -> Change | None:
        """Against the dense model; None where either was not measured."""
        found = self.results.get(task, {})
        if 0.0 not in found or ratio not in found:
            return None
        return paired_change(found[0.0].per_document, found[ratio].per_document, found[ratio].metric)

    def mark(self, task: str, ratio: float) -> str:
        change = self.change(task, ratio) if ratio else None
        if change is None:
            return ""
        if change.is_noise:
            return NOISE
        return WORSE if (change.difference > 0) == TASKS[task].lower_is_better else BETTER

    def expansion_ratio(self, ratio: float) -> float:
        return next(found[ratio] for found in self.results.values() if ratio in found).configuration["expansion_ratio"]


def all_series(results: Sequence[Result]) -> list[Series]:
    """One for each model and recipe; a model that was only measured dense has one, named so."""
    series = []
    for model in dict.fromkeys(result.model for result in results):
        own = [result for result in results if result.model == model]
        for recipe in list(dict.fromkeys(_recipe(r) for r in own if _recipe(r))) or [DENSE]:
            chosen: dict[str, dict[float, Result]] = {}
            for result in own:
                if _recipe(result) in (None, recipe):
                    chosen.setdefault(result.task, {})[result.configuration["ratio"]] = result
            series.append(Series(model, recipe, {task: chosen[task] for task in TASKS if task in chosen}))
    return series


def _recipe(result: Result) -> str | None:
    name, multiple = result.configuration["recipe"], result.configuration["multiple_of"]
    return f"{name}, multiples of {multiple}" if name and multiple > 1 else name


def summary(results: Sequence[Result]) -> str:
    """The scores as text for a terminal."""
    lines = []
    for series in all_series(results):
        ratios = [0.0, *series.ratios]
        lines += ["", f"{series.model}, {series.recipe}: {next(iter(results)).limits}", ""]
        lines.append(f"{'task':<18}" + "".join(f"{DENSE if not r else f'{r:.0%}':>20}" for r in ratios))
        for task, found in series.results.items():
            cells = [f"{_score(found[r])} {series.mark(task, r)}" if r in found else "–" for r in ratios]
            lines.append(f"{task:<18}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join([*lines, "", _LEGEND.replace("**", "")])


_LEGEND = (
    f"± is one standard error of the score alone. The marks compare with the dense model on the same documents, at 95 %:"
    f" {BETTER} better, {WORSE} worse, {NOISE} **within the noise**."
)


def _score(result: Result) -> str:
    value = number(result.value) if TASKS[result.task].lower_is_better else f"{result.value:.3f}"
    if result.stderr is None:
        return value
    return f"{value} ±{number(result.stderr) if TASKS[result.task].lower_is_better else f'{result.stderr:.3f}'}"


def write(folder: Folder, out: str | Path, records: Sequence[Record] = ()) -> Path:
    """Write the report of a study and its plots into `out`; returns its path.

    Args:
        records: of `gluprune bench`, where there are any: J/token and time per output token to set scores against.

    Raises:
        ValueError: the folder holds no study, or no result yet.
    """
    results = folder.results()
    if not results:
        raise ValueError(f"{folder.path} holds no result yet")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    every = all_series(results)
    parts = [
        "# " + ", ".join(dict.fromkeys(series.model for series in every)) + ": capability against width\n",
        _conditions(results),
        _in_short(every),
        *(_scores(series) for series in every),
        _groups(every),
        _findings(every),
        _beside_published(every),
        _correlations(every, out),
        _lengths(every),
        _pictures(every, records, out),
    ]
    write_file(out / NAME, ["\n".join(part for part in parts if part).encode()])
    return out / NAME


# --- sections ---


def _conditions(results: Sequence[Result]) -> str:
    """What was run, on what, with what."""
    first = results[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    machines = " and ".join(dict.fromkeys(result.hardware for result in results))
    commits = ", ".join(dict.fromkeys(result.commit or "none" for result in results))
    seconds: dict[tuple, float] = {}
    for result in results:
        key = result.model, result.configuration["recipe"], result.configuration["ratio"]
        seconds[key] = seconds.get(key, 0.0) + result.seconds
    spent = sorted(seconds.values())
    revisions = ", ".join(dict.fromkeys(f"{result.model} {result.revision}" for result in results))
    lines = [
        (
            f"- Limits: **{first.limits}**, {first.data}, weights in {first.dtype}, {first.backend}"
            f"{', patched' if first.patched else ''}. Prompts without a chat template, as in the published study."
        ),
        f"- Machine: {machines}" + (f", driver {first.driver}" if first.driver else "") + ".",
        f"- {versions}; commits {commits}; model revisions {revisions}.",
        f"- {len(seconds)} configurations, {spent[0]:.0f} to {spent[-1]:.0f} s of evaluation each, as the machine was.",
    ]
    return "\n".join(lines) + "\n"


def _in_short(every: list[Series]) -> str:
    """What the results show, and what their noise forbids to say."""
    lines = ["## In short", ""]
    for series in every:
        if not series.ratios:
            continue
        shown, hidden, bare = [], [], []
        for task, found in series.results.items():
            counts = _counts(series, [task])
            total = sum(counts.values())
            moved = ", ".join(f"{mark} {counts[mark]}" for mark in (WORSE, BETTER) if counts[mark])
            told = f"{task} ({moved} of {total})" if moved else task
            if has_nothing_to_lose(found.get(0.0)):
                bare.append(told)
            elif any(is_beyond_chance(counts[mark], total) for mark in (WORSE, BETTER)):
                shown.append(told)
            elif total:
                hidden.append(told)
        lines += [
            f"**{series.model}, {series.recipe}**",
            "",
            f"- Shown, beyond the noise of these documents: {', '.join(shown) or 'nothing'}.",
            f"- Forbidden to say anything about, no more changes than chance gives: {', '.join(hidden) or 'nothing'}.",
            "- No loss can show, the dense model itself is not above chance, or at zero:"
            f" {', '.join(bare) or 'nowhere'}.",
            "",
        ]
    return "\n".join(lines) if len(lines) > 2 else ""


def _scores(series: Series) -> str:
    ratios = [0.0, *series.ratios]
    heads = [
        f"{DENSE if not ratio else f'{ratio:.0%}'} ({series.expansion_ratio(ratio):.2f})"
        for ratio in ratios
        if any(ratio in found for found in series.results.values())
    ]
    lines = [
        f"## {series.model}, {series.recipe}",
        "",
        f"Columns: share of the neurons removed (expansion ratio). {_LEGEND} –: not measured.",
        "",
        f"| task | metric | shots | documents | {' | '.join(heads)} |",
        "|---|---|--:|--:|" + "--:|" * len(heads),
    ]
    for task, found in series.results.items():
        any_result = next(iter(found.values()))
        cells = [f"{_score(found[r])} {series.mark(task, r)}".strip() if r in found else "–" for r in ratios]
        lines.append(
            f"| {task} | {any_result.metric.partition(',')[0]} | {any_result.shots} | {any_result.documents} of"
            f" {any_result.available} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def _counts(series: Series, tasks: Sequence[str]) -> dict[str, int]:
    marks = [series.mark(task, ratio) for task in tasks for ratio in series.ratios]
    return {mark: marks.count(mark) for mark in (BETTER, WORSE, NOISE)}


def _groups(every: list[Series]) -> str:
    lines = [
        "## Fragile and robust",
        "",
        (
            f"How many of the scores (tasks × ratios) are {BETTER} better and {WORSE} worse than dense, or {NOISE} within the"
            " noise. Of scores that do not change one in twenty is marked all the same."
        ),
        "",
        f"| model | recipe | group | tasks | {BETTER} | {WORSE} | {NOISE} |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for series in every:
        for group, words in GROUPS.items():
            tasks = [task for task in series.results if TASKS[task].group == group]
            counts = _counts(series, tasks)
            if any(counts.values()):
                lines.append(
                    f"| {series.model} | {series.recipe} | {words} | {', '.join(tasks)} |"
                    f" {' | '.join(map(str, counts.values()))} |"
                )
    return "\n".join(lines) + "\n" if len(lines) > 6 else ""


@dataclass(frozen=True)
class Claim:
    """A published finding: the scores of these tasks get better (True) or worse (False) as neurons are removed."""

    words: str
    tasks: tuple[str, ...]
    better: bool


CLAIMS = (
    Claim("Knowledge is fragile: MMLU falls", ("mmlu",), False),
    Claim("Arithmetic is fragile: GSM8K falls", ("gsm8k",), False),
    Claim("Perplexity is fragile: WikiText and Lambada rise", ("wikitext", "lambada_openai"), False),
    Claim("Instruction following improves: IFEval rises", ("ifeval",), True),
    Claim("Multi-step reasoning is robust: MuSR rises", ("leaderboard_musr",), True),
    Claim("Truthfulness improves: TruthfulQA-MC2 rises", ("truthfulqa_mc2",), True),
)


def verdict(claim: Claim, series: Series) -> str:
    """Whether a published finding holds in a study, in words."""
    tasks = [task for task in claim.tasks if task in series.results]
    counts = _counts(series, tasks)
    total = sum(counts.values())
    if not total:
        return "not measured"
    agree, against = (counts[BETTER], counts[WORSE]) if claim.better else (counts[WORSE], counts[BETTER])
    told = f"{agree} of {total} changes with it beyond the noise, {against} against it"
    nothing = [task for task in tasks if has_nothing_to_lose(series.results[task].get(0.0))]
    if nothing and not claim.better:
        return f"**cannot be told**: the dense model is not above chance on {', '.join(nothing)}"
    holds, fails = is_beyond_chance(agree, total), is_beyond_chance(against, total)
    word = "mixed" if holds and fails else "holds" if holds else "does not hold" if fails else "within the noise"
    return f"**{word}** ({told})"


def has_nothing_to_lose(dense: Result | None) -> bool:
    """Whether the dense score is at zero, or not above what guessing gives."""
    if dense is None or TASKS[dense.task].lower_is_better:
        return False
    chance = TASKS[dense.task].chance or 0.0
    return dense.value - 1.96 * (dense.stderr or 0.0) <= chance


def published_verdict(claim: Claim, model: str) -> str:
    """In how many of the published configurations the scores moved as the finding says."""
    moves = []
    for task in claim.tasks:
        sign = -1 if TASKS[task].lower_is_better else 1
        moves += [sign * change for change in published.changes(model, task).values()]
    if not moves:
        return "not published"
    agree = sum((move > 0) == claim.better for move in moves)
    word = "holds" if agree == len(moves) else "does not hold" if agree == 0 else "mixed"
    return f"{word}: {agree} of {len(moves)}"


def _findings(every: list[Series]) -> str:
    pruned = [series for series in every if series.ratios]
    if not pruned:
        return ""
    lines = [
        "## What holds here of the published findings",
        "",
        (
            f"Published: in how many configurations the score moved so, noise not considered ({published.SOURCE}). IFEval rises"
            " there for the two base models; the published instruct model falls."
        ),
        "",
        f"| finding | {' | '.join(published.MODELS)} | {' | '.join(f'{s.model}, {s.recipe}' for s in pruned)} |",
        "|---|" + "---|" * (len(published.MODELS) + len(pruned)),
    ]
    for claim in CLAIMS:
        cells = [published_verdict(claim, model) for model in published.MODELS]
        cells += [verdict(claim, series) for series in pruned]
        lines.append(f"| {claim.words} | {' | '.join(cells)} |")
    cells = [_correlation_cell(_published_correlation(model)) for model in published.MODELS]
    cells += [_correlation_cell(_correlation(series, "mmlu", "truthfulqa_mc2")) for series in pruned]
    lines.append(
        f"| Knowledge against truthfulness: MMLU and TruthfulQA-MC2 are anticorrelated | {' | '.join(cells)} |"
    )
    return "\n".join(lines) + "\n"


def _correlation_cell(found: Correlation | None) -> str:
    if found is None:
        return "cannot be told: fewer than four configurations, or a score that never changes"
    word = "cannot be told" if found.low <= 0 <= found.high else "holds" if found.r < 0 else "does not hold"
    return f"{word}: {found}"


def _beside_published(every: list[Series]) -> str:
    lines = []
    for series in every:
        if not series.ratios:
            continue
        heads = [series.recipe, *published.MODELS]
        lines += [
            f"## {series.model}, {series.recipe}, beside the published Llama-3.2",
            "",
            "Change against the dense model in per cent of its score; of perplexities too.",
            "",
            "| task | removed | " + " | ".join(heads) + " |",
            "|---|--:|" + "--:|" * len(heads),
        ]
        for task in series.results:
            theirs = [published.changes(model, task) for model in published.MODELS]
            for ratio in series.ratios:
                change = series.change(task, ratio)
                cells = [f"{_percent(change.relative)} {series.mark(task, ratio)}" if change else "–"]
                cells += [_percent(found[ratio]) if ratio in found else "–" for found in theirs]
                lines.append(f"| {task} | {ratio:.0%} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:+,.1f} %"


def correlate(first: str, second: str, x: dict[float, float], y: dict[float, float]) -> Correlation | None:
    """Of two tasks, over the ratios at which both have a score; perplexities count by their logarithm."""

    def axis(task: str, values: dict[float, float]) -> list[float]:
        shared = sorted(x.keys() & y.keys())
        return [math.log(values[r]) if TASKS[task].lower_is_better else values[r] for r in shared]

    return pearson(axis(first, x), axis(second, y))


def _published_correlation(model: str, first: str = "mmlu", second: str = "truthfulqa_mc2") -> Correlation | None:
    return correlate(first, second, published.series(model, first), published.series(model, second))


def _correlation(series: Series, first: str, second: str) -> Correlation | None:
    values = ({r: result.value for r, result in series.results.get(task, {}).items()} for task in (first, second))
    return correlate(first, second, *values)


def _correlations(every: list[Series], out: Path) -> str:
    """Every pair of tasks of every series and of the published models, as a CSV file and a picture."""
    table: dict[tuple[str, str], dict[tuple[str, str], Correlation]] = {}
    for series in every:
        pairs = {pair: _correlation(series, *pair) for pair in combinations(series.results, 2)}
        table[series.model, series.recipe] = {pair: found for pair, found in pairs.items() if found}
    for model in published.MODELS:
        pairs = {pair: _published_correlation(model, *pair) for pair in combinations(TASKS, 2)}
        table[model, "published"] = {pair: found for pair, found in pairs.items() if found}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["model", "recipe", "task", "other_task", "n", "r", "p", "low_95", "high_95"])
    for (model, recipe), pairs in table.items():
        for pair, c in pairs.items():
            rows.writerow([model, recipe, *pair, c.n, f"{c.r:.4f}", f"{c.p:.4g}", f"{c.low:.4f}", f"{c.high:.4f}"])
    write_file(out / CORRELATIONS, [text.getvalue().encode()])
    counts = [
        f"- {model}, {recipe}: {sum(c.p < 0.05 for c in pairs.values())} of {len(pairs)} pairs with p < 0.05"
        for (model, recipe), pairs in table.items()
        if pairs
    ]
    plot_correlations({key: pairs for key, pairs in table.items() if pairs}, out / "correlations.png")
    return "\n".join(
        [
            "## Correlations between tasks",
            "",
            (
                "Pearson's r over the configurations of a series, dense included: two scores that both follow the width"
                f" correlate whatever they measure. Perplexities count by their logarithm. Every pair with p and confidence interval: [{CORRELATIONS}]({CORRELATIONS})."
            ),
            "",
            *counts,
            "",
            "![correlations](correlations.png)",
            "",
        ]
    )


def _lengths(every: list[Series]) -> str:
    rows = []
    for series in every:
        for task, found in series.results.items():
            for ratio, result in sorted(found.items()):
                if result.lengths:
                    full = sum(length >= 0.95 * (result.generation_limit or math.inf) for length in result.lengths)
                    rows.append(
                        f"| {series.model} | {series.recipe if ratio else DENSE} | {task} | {ratio:.0%} |"
                        f" {statistics.mean(result.lengths):.0f} | {result.generation_limit or 'task’s own'} |"
                        f" {full} of {len(result.lengths)} |"
                    )
    if not rows:
        return ""
    return "\n".join(
        [
            "## Length of what was generated",
            "",
            (
                "Tokens of the text until the model or a stop word ended it, tokenized again: garbled text comes out"
                " shorter. The published latency followed this length, not the time a token took."
            ),
            "",
            "| model | recipe | task | removed | mean tokens | limit | at the limit |",
            "|---|---|---|--:|--:|--:|--:|",
            *dict.fromkeys(rows),
            "",
        ]
    )


def _pictures(every: list[Series], records: Sequence[Record], out: Path) -> str:
    pruned = [series for series in every if series.ratios]
    if not pruned:
        return ""
    lines = ["## Pictures", ""]
    for index, model in enumerate(dict.fromkeys(series.model for series in pruned)):
        suffix = f"-{index + 1}" if index else ""
        own = [series for series in pruned if series.model == model]
        plot_capability(own, out / f"capability{suffix}.png")
        plot_published(own, out / f"published{suffix}.png")
        lines.append(f"![capability of {model} against expansion ratio](capability{suffix}.png)\n")
        lines.append(f"![change of {model} beside the published models](published{suffix}.png)\n")
        for what, unit, words, name in COSTS:
            costs = costs_by_width([r for r in records if _is_cost(r, model, what, unit)])
            if plot_cost(own, costs, words, out / f"{name}{suffix}.png"):
                lines.append(f"![capability of {model} against {words}]({name}{suffix}.png)\n")
            else:
                lines.append(f"{model}: {words} was not measured at these widths; nothing is drawn against it.\n")
    return "\n".join(lines)


COSTS = (
    ("generation: energy", "J/token", "J/token", "energy"),
    ("generation: TPOT", "s", "time per output token", "tpot"),
)


def _is_cost(record: Record, model: str, what: str, unit: str) -> bool:
    return (record.what, record.unit, record.shape.get("model")) == (what, unit, model) and record.p50 is not None


def costs_by_width(records: Sequence[Record]) -> dict[int, Record]:
    """Intermediate size -> record, of the one provider and workload that was measured at most widths."""
    ways: dict[tuple, dict[int, Record]] = {}
    for record in records:
        rest = tuple(sorted((key, value) for key, value in record.shape.items() if key != "I"))
        ways.setdefault((record.provider, rest, record.dtype, record.hardware), {})[record.shape["I"]] = record
    return max(ways.values(), key=len, default={})


# --- plots ---


def _panels(count: int):
    from matplotlib.figure import Figure

    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.4 * columns, 0.9 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for empty in panels[count:]:
        empty.set_axis_off()
    return figure, list(panels[:count])


def _titled(axes, task: str) -> None:
    spec = TASKS[task]
    axes.set_title(f"{task} ({'lower' if spec.lower_is_better else 'higher'} is better)", fontsize="small")
    axes.tick_params(labelsize="x-small")
    axes.grid(alpha=0.3)


def plot_capability(own: list[Series], path: Path) -> None:
    """Every task's score against the expansion ratio, a line a recipe, bars of one standard error."""
    tasks = list(dict.fromkeys(task for series in own for task in series.results))
    figure, panels = _panels(len(tasks))
    for task, axes in zip(tasks, panels):
        for index, series in enumerate(own):
            found = dict(sorted(series.results.get(task, {}).items()))
            x = [result.configuration["expansion_ratio"] for result in found.values()]
            errors = [result.stderr or 0.0 for result in found.values()]
            values = [result.value for result in found.values()]
            if TASKS[task].lower_is_better:  # the axis is logarithmic: keep bars above zero
                errors = [[min(e, 0.9 * v) for e, v in zip(errors, values)], errors]
            line = {"color": f"C{index}", "marker": "o", "ms": 3.5, "lw": 1.2, "capsize": 2, "elinewidth": 0.8}
            axes.errorbar(x, values, yerr=errors, label=series.recipe, **line)
        if TASKS[task].lower_is_better:
            axes.set_yscale("log")
        elif TASKS[task].chance is not None:
            axes.axhline(TASKS[task].chance, color="grey", linestyle=":", label="chance")
        _titled(axes, task)
        axes.invert_xaxis()
    _finish(figure, panels, f"{own[0].model}: score against expansion ratio (bars: one standard error)", path)


def plot_published(own: list[Series], path: Path) -> None:
    """Every task's score over the dense model's against the share of neurons removed, with the published models."""
    tasks = list(dict.fromkeys(task for series in own for task in series.results))
    figure, panels = _panels(len(tasks))
    for task, axes in zip(tasks, panels):
        axes.axhline(1, color="black", lw=0.8)
        for index, series in enumerate(own):
            found = dict(sorted(series.results.get(task, {}).items()))
            dense = found[0.0].value if 0.0 in found else 0.0
            if dense:
                values = [result.value / dense for result in found.values()]
                axes.plot(list(found), values, marker="o", ms=3.5, lw=1.6, color=f"C{index}", label=_label(series))
        for model, style in zip(published.MODELS, ("--", "-.", ":")):
            values = published.series(model, task)
            if values:
                shares = [value / values[0.0] for value in values.values()]
                axes.plot(list(values), shares, style, color="grey", label=f"{model}, published")
        if TASKS[task].lower_is_better:
            axes.set_yscale("log")
        _titled(axes, task)
    _finish(figure, panels, "Score over that of the dense model against the share of neurons removed", path)


def plot_cost(own: list[Series], costs: dict[int, Record], words: str, path: Path) -> bool:
    """Every task's score against a cost measured at the same widths; False, and no file, where fewer than two are."""
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
    tasks = list(dict.fromkeys(task for series in own for task in series.results))
    figure, panels = _panels(len(tasks))
    for task, axes in zip(tasks, panels):
        for index, (recipe, of) in enumerate(points.items()):
            if of.get(task):
                axes.plot(*zip(*of[task]), marker="o", ms=3.5, lw=1.2, color=f"C{index}", label=recipe)
        if TASKS[task].lower_is_better:
            axes.set_yscale("log")
        _titled(axes, task)
    record = next(iter(costs.values()))
    how = ", ".join(f"{key} {value}" for key, value in record.shape.items() if key not in ("model", "I", "H"))
    title = f"{own[0].model}: score against {words} ({record.unit}), by {record.provider}, {how or record.what}, {record.hardware}"
    _finish(figure, panels, title, path)
    return True


def plot_correlations(table: dict[tuple[str, str], dict[tuple[str, str], Correlation]], path: Path) -> None:
    """A matrix of r for each series; pairs with p < 0.05 carry their figure."""
    from matplotlib.figure import Figure

    columns = min(3, len(table))
    rows = math.ceil(len(table) / columns)
    figure = Figure(figsize=(5.4 * columns, 4.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for empty in panels[len(table) :]:
        empty.set_axis_off()
    for axes, ((model, recipe), pairs) in zip(panels, table.items()):
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
        axes.set_title(f"{model}, {recipe}", fontsize="small")
    figure.colorbar(image, ax=list(panels), shrink=0.6, label="Pearson's r (figures where p < 0.05)")
    figure.savefig(path, dpi=110)


def _label(series: Series) -> str:
    return f"{series.model}, {series.recipe}"


def _finish(figure, panels, title: str, path: Path) -> None:
    handles: dict[str, object] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), fontsize="small"
    )
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)
