"""The report of a study in Markdown: tables, findings, correlations and plots from its results."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from gluprune.io.atomic import write_file
from gluprune.measure.records import Record
from gluprune_evals import plots
from gluprune_evals.findings import CLAIMS, has_nothing_to_lose, published_verdict, shows_more_than_noise, verdict
from gluprune_evals.folder import Folder
from gluprune_evals.harness import Result
from gluprune_evals.paper import scores
from gluprune_evals.series import (
    BETTER,
    DENSE,
    NOISE,
    WORSE,
    Series,
    all_series,
    correlate,
    mark_counts,
    series_correlation,
)
from gluprune_evals.significance import Correlation
from gluprune_evals.summary import LEGEND, STANDARD_ERROR, by_size, compared_scores, comparison_legend, score
from gluprune_evals.tasks import FRAGILE, OTHER, ROBUST, TASKS

NAME = "study.md"
CORRELATIONS = "correlations.csv"
GROUPS = {
    FRAGILE: "published as fragile: knowledge, arithmetic, perplexity",
    ROBUST: "published as robust: instructions, multi-step reasoning, truthfulness",
    OTHER: "not in the published dichotomy",
}


def write(folder: Folder, out: str | Path, records: Sequence[Record] = ()) -> Path:
    """Write the report of a study and its plots into a folder.

    Args:
        folder: The study.
        out: Where to write; created if it does not exist.
        records: Records of `gluprune bench`, if there are any: J/token and time per output token to plot scores
            against.

    Returns:
        The path of the report.

    Raises:
        ValueError: The folder does not hold a study, or holds no results yet.
    """
    results = folder.results()
    if not results:
        raise ValueError(f"{folder.path} holds no result yet")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    every = all_series(results)
    pruned = [series for series in every if series.ratios]
    unchanged = by_size([series for series in every if not series.ratios])
    subject = "capability against width" if pruned else "scores"
    parts = [
        "# " + ", ".join(dict.fromkeys(series.model for series in [*pruned, *unchanged])) + f": {subject}\n",
        _conditions(results),
        _in_short(pruned) if pruned else "",
        *(_scores(series) for series in pruned),
        _side_by_side(unchanged) if unchanged else "",
    ]
    if pruned:
        parts += [_groups(pruned), _findings(pruned), _against_published(pruned), _correlations(pruned, out)]
    parts += [_lengths(every), _pictures(pruned, records, out) if pruned else ""]
    write_file(out / NAME, ["\n".join(part for part in parts if part).encode()])
    return out / NAME


def _conditions(results: Sequence[Result]) -> str:
    """What was run, and the machine and versions."""
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
        f"- {len(seconds)} configurations, {spent[0]:.0f} to {spent[-1]:.0f} s of evaluation each.",
    ]
    return "\n".join(lines) + "\n"


def _in_short(pruned: list[Series]) -> str:
    """What the results show, and what is within their noise."""
    lines = ["## In short", ""]
    for series in pruned:
        shown, hidden, bare = [], [], []
        for task, found in series.results.items():
            counts = mark_counts(series, [task])
            total = sum(counts.values())
            moved = ", ".join(f"{mark} {counts[mark]}" for mark in (WORSE, BETTER) if counts[mark])
            text = f"{task} ({moved} of {total})" if moved else task
            if has_nothing_to_lose(found.get(0.0)):
                bare.append(text)
            elif shows_more_than_noise(series, task):
                shown.append(text)
            elif total:
                hidden.append(text)
        lines += [
            f"**{series.title}**",
            "",
            f"- Shown, beyond the noise of these documents: {', '.join(shown) or 'nothing'}.",
            f"- Undecided, no more changes than expected by chance: {', '.join(hidden) or 'nothing'}.",
            f"- A loss cannot show, the dense model is not above chance, or at zero: {', '.join(bare) or 'nowhere'}.",
            "",
        ]
    return "\n".join(lines)


def _scores(series: Series) -> str:
    ratios = [0.0, *series.ratios]
    heads = [
        f"{f'{ratio:.0%}' if ratio else DENSE} ({series.expansion_ratio(ratio):.2f})"
        for ratio in ratios
        if any(ratio in found for found in series.results.values())
    ]
    lines = [
        f"## {series.title}",
        "",
        f"Columns: share of the neurons removed (expansion ratio). {LEGEND} –: missing.",
        "",
        *_head(heads),
    ]
    for found in series.results.values():
        cells = [f"{score(found[r])} {series.mark(found[r].task, r)}".strip() if r in found else "–" for r in ratios]
        lines.append(_row(next(iter(found.values())), cells))
    return "\n".join(lines) + "\n"


def _side_by_side(models: Sequence[Series]) -> str:
    """The scores of models that were not pruned in the study, the largest first."""
    legend = comparison_legend(models[0]) if len(models) > 1 else STANDARD_ERROR
    lines = [
        "## " + ", ".join(series.title for series in models),
        "",
        f"Columns: model (expansion ratio). {legend} –: missing.",
        "",
        *_head([f"{series.model} ({series.expansion_ratio(0.0):.2f})" for series in models]),
        *(_row(result, cells) for result, cells in compared_scores(models)),
    ]
    return "\n".join(lines) + "\n"


def _head(heads: Sequence[str]) -> list[str]:
    return [
        f"| task | metric | shots | documents | {' | '.join(heads)} |",
        "|---|---|--:|--:|" + "--:|" * len(heads),
    ]


def _row(result: Result, cells: Sequence[str]) -> str:
    documents = f"{result.documents} of {result.available}"
    return f"| {result.task} | {result.metric.partition(',')[0]} | {result.shots} | {documents} | {' | '.join(cells)} |"


def _groups(pruned: list[Series]) -> str:
    lines = [
        "## Fragile and robust",
        "",
        (
            f"How many of the scores (tasks × ratios) are {BETTER} better and {WORSE} worse than dense, or {NOISE}"
            " within the noise. One in twenty scores that do not change is marked by chance."
        ),
        "",
        f"| model | recipe | group | tasks | {BETTER} | {WORSE} | {NOISE} |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for series in pruned:
        for group, words in GROUPS.items():
            tasks = [task for task in series.results if TASKS[task].group == group]
            counts = mark_counts(series, tasks)
            if any(counts.values()):
                lines.append(
                    f"| {series.model} | {series.recipe} | {words} | {', '.join(tasks)} |"
                    f" {' | '.join(map(str, counts.values()))} |"
                )
    return "\n".join(lines) + "\n" if len(lines) > 6 else ""


def _findings(pruned: list[Series]) -> str:
    lines = [
        "## Which of the published findings hold here",
        "",
        (
            f"Published: in how many configurations the score moved in this direction, noise not considered"
            f" ({scores.SOURCE}). IFEval rises there for the two base models and falls for the instruct model."
        ),
        "",
        f"| finding | {' | '.join(scores.MODELS)} | {' | '.join(f'{s.model}, {s.recipe}' for s in pruned)} |",
        "|---|" + "---|" * (len(scores.MODELS) + len(pruned)),
    ]
    for claim in CLAIMS:
        cells = [published_verdict(claim, model) for model in scores.MODELS]
        cells += [verdict(claim, series) for series in pruned]
        lines.append(f"| {claim.words} | {' | '.join(cells)} |")
    cells = [_correlation_cell(_published_correlation(model)) for model in scores.MODELS]
    cells += [_correlation_cell(series_correlation(series, "mmlu", "truthfulqa_mc2")) for series in pruned]
    lines.append(
        f"| Knowledge against truthfulness: MMLU and TruthfulQA-MC2 are anticorrelated | {' | '.join(cells)} |"
    )
    return "\n".join(lines) + "\n"


def _correlation_cell(found: Correlation | None) -> str:
    if found is None:
        return "cannot be judged: fewer than four configurations, or a constant score"
    word = "cannot be judged" if found.low <= 0 <= found.high else "holds" if found.r < 0 else "does not hold"
    return f"{word}: {found}"


def _against_published(pruned: list[Series]) -> str:
    lines = []
    for series in pruned:
        heads = [series.recipe, *scores.MODELS]
        lines += [
            f"## {series.model}, {series.recipe}, and the published Llama-3.2",
            "",
            "Change against the dense model in per cent of its score or perplexity.",
            "",
            "| task | removed | " + " | ".join(heads) + " |",
            "|---|--:|" + "--:|" * len(heads),
        ]
        for task in series.results:
            theirs = [scores.changes(model, task) for model in scores.MODELS]
            for ratio in series.ratios:
                change = series.change(task, ratio)
                cells = [f"{_percent(change.relative)} {series.mark(task, ratio)}" if change else "–"]
                cells += [_percent(found[ratio]) if ratio in found else "–" for found in theirs]
                lines.append(f"| {task} | {ratio:.0%} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:+,.1f} %"


def _published_correlation(model: str, first: str = "mmlu", second: str = "truthfulqa_mc2") -> Correlation | None:
    return correlate(first, second, scores.series(model, first), scores.series(model, second))


def _correlations(pruned: list[Series], out: Path) -> str:
    """Every pair of tasks of every series and of the published models, as a CSV file and a picture."""
    table: dict[tuple[str, str], dict[tuple[str, str], Correlation]] = {}
    for series in pruned:
        pairs = {pair: series_correlation(series, *pair) for pair in combinations(series.results, 2)}
        table[series.model, series.recipe] = {pair: found for pair, found in pairs.items() if found}
    for model in scores.MODELS:
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
    plots.correlations({key: pairs for key, pairs in table.items() if pairs}, out / "correlations.png")
    return "\n".join(
        [
            "## Correlations between tasks",
            "",
            (
                "Pearson's r over the configurations of a series, including dense: two scores that both follow the"
                " width correlate whatever they measure. Perplexities enter as logarithms. Every pair with p and"
                f" confidence interval: [{CORRELATIONS}]({CORRELATIONS})."
            ),
            "",
            *counts,
            "",
            "![correlations](correlations.png)",
            "",
        ]
    )


def _lengths(every: list[Series]) -> str:
    rows, own = [], "the task's own"
    for series in every:
        for task, found in series.results.items():
            for ratio, result in sorted(found.items()):
                if result.lengths:
                    full = sum(length >= 0.95 * (result.generation_limit or math.inf) for length in result.lengths)
                    recipe = DENSE if series.ratios and not ratio else series.recipe
                    rows.append(
                        f"| {series.model} | {recipe} | {task} | {ratio:.0%} |"
                        f" {statistics.mean(result.lengths):.0f} | {result.generation_limit or own} |"
                        f" {full} of {len(result.lengths)} |"
                    )
    if not rows:
        return ""
    return "\n".join(
        [
            "## Length of the generated text",
            "",
            (
                "Tokens of the text until the model or a stop word ended it, tokenized again: garbled text becomes"
                " shorter. The published latency follows this length, not the time per token."
            ),
            "",
            "| model | recipe | task | removed | mean tokens | limit | at the limit |",
            "|---|---|---|--:|--:|--:|--:|",
            *dict.fromkeys(rows),
            "",
        ]
    )


def _pictures(pruned: list[Series], records: Sequence[Record], out: Path) -> str:
    lines = ["## Pictures", ""]
    for index, model in enumerate(dict.fromkeys(series.model for series in pruned)):
        suffix = f"-{index + 1}" if index else ""
        own = [series for series in pruned if series.model == model]
        plots.capability(own, out / f"capability{suffix}.png")
        plots.against_published(own, out / f"published{suffix}.png")
        lines.append(f"![capability of {model} against expansion ratio](capability{suffix}.png)\n")
        lines.append(f"![change of {model} and the published models](published{suffix}.png)\n")
        for what, unit, words, name in COSTS:
            costs = costs_by_width([r for r in records if _is_cost(r, model, what, unit)])
            if plots.cost(own, costs, words, out / f"{name}{suffix}.png"):
                lines.append(f"![capability of {model} against {words}]({name}{suffix}.png)\n")
            else:
                lines.append(f"{model}: {words} is missing at these widths; nothing is drawn against it.\n")
    return "\n".join(lines)


COSTS = (
    ("generation: energy", "J/token", "J/token", "energy"),
    ("generation: TPOT", "s", "time per output token", "tpot"),
)


def _is_cost(record: Record, model: str, what: str, unit: str) -> bool:
    return (record.what, record.unit, record.shape.get("model")) == (what, unit, model) and record.p50 is not None


def costs_by_width(records: Sequence[Record]) -> dict[int, Record]:
    """Return intermediate size -> record of the provider and workload that was measured at the most widths."""
    ways: dict[tuple, dict[int, Record]] = {}
    for record in records:
        rest = tuple(sorted((key, value) for key, value in record.shape.items() if key != "I"))
        ways.setdefault((record.provider, rest, record.dtype, record.hardware), {})[record.shape["I"]] = record
    return max(ways.values(), key=len, default={})
