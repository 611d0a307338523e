"""The published scores of Llama-3.2 (arXiv 2512.22671), from the package's data file; its README names the source."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files

SOURCE = "arXiv 2512.22671, data of github.com/peremartra/llama-glu-expansion-pruning (MIT)"
MODELS = ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.2-1B-Instruct")


@dataclass(frozen=True)
class Score:
    """One task of one published configuration; pruning 0.1 is 10 % of the neurons removed."""

    model: str
    pruning: float
    expansion_ratio: float
    task: str
    value: float
    stderr: float | None


def scores(model: str) -> list[Score]:
    """Return all published scores of a model, the dense ones first."""
    text = (files("gluprune_evals.paper") / "data" / "published.csv").read_text(encoding="utf-8")
    return [
        Score(
            model,
            int(row["pruning_percent"]) / 100,
            float(row["expansion_ratio"]),
            row["task"],
            float(row["value"]),
            float(row["stderr"]) if row["stderr"] else None,
        )
        for row in csv.DictReader(text.splitlines())
        if row["model"] == model
    ]


def series(model: str, task: str) -> dict[float, float]:
    """Return pruning -> score of one task, dense first."""
    return {score.pruning: score.value for score in scores(model) if score.task == task}


def changes(model: str, task: str) -> dict[float, float]:
    """Return pruning -> relative change against the dense model; 0.1 is +10 %."""
    values = series(model, task)
    return {pruning: value / values[0.0] - 1 for pruning, value in values.items() if pruning}
