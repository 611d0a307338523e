"""What was done to a model: steps that `prune` and `reconstruct` record, and that its checkpoint keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version

from torch import nn

from gluprune import __version__
from gluprune.calibration.statistics import Statistics
from gluprune.pruning.recipe import Recipe
from gluprune.pruning.report import PruneReport

_ATTRIBUTE = "gluprune_steps"


def steps_of(model: nn.Module) -> list[dict]:
    """Return the steps that were recorded on a model since it was loaded."""
    return list(getattr(model, _ATTRIBUTE, ()))


def record(model: nn.Module, step: dict) -> None:
    """Add a step to those of a model."""
    setattr(model, _ATTRIBUTE, [*steps_of(model), step])


def prune_step(report: PruneReport, recipe: Recipe, calibration: dict | None) -> dict:
    """Return the description of a pruning, ready for JSON.

    Args:
        report: What was done.
        recipe: How.
        calibration: See `calibration_entry`; None if the recipe uses no calibration data.
    """
    figures = {name: value for name, value in report.to_dict().items() if name != "kept"}
    return {
        "step": "prune",
        "recipe": str(recipe),
        **figures,
        "calibration": calibration,
        "versions": versions(),
    }


def reconstruct_step(tokens: int) -> dict:
    """Return the description of a reconstruction on so many tokens, ready for JSON."""
    return {"step": "reconstruct", "calibration": {"tokens": tokens}, "versions": versions()}


def heal_step(settings: dict, losses: Sequence[float], calibration: dict) -> dict:
    """Return the description of a healing, ready for JSON.

    Args:
        settings: How the model was trained, and by which teacher.
        losses: Of every step.
        calibration: Tokens that it was trained on, and name -> SHA-256 of the texts.
    """
    loss = loss_ends(losses)
    return {"step": "heal", **settings, "loss": loss, "calibration": calibration, "versions": versions()}


def loss_ends(losses: Sequence[float]) -> dict[str, float]:
    """Return the mean losses of the first and of the last tenth of the steps."""
    part = max(1, len(losses) // 10)
    return {"first": sum(losses[:part]) / part, "last": sum(losses[-part:]) / part}


def measure_step(
    *, perplexity: float, dense_perplexity: float, tokens: int, length: int, texts: dict[str, str]
) -> dict:
    """Return the description of a measurement, ready for JSON.

    Args:
        perplexity: That of the pruned model.
        dense_perplexity: That of the dense model.
        tokens: Number of tokens that they were measured on.
        length: Tokens per window.
        texts: Name -> SHA-256 of the texts.
    """
    return {
        "step": "measure",
        "perplexity": perplexity,
        "dense_perplexity": dense_perplexity,
        "tokens": tokens,
        "length": length,
        "texts": texts,
        "versions": versions(),
    }


def calibration_entry(calibration: object) -> dict:
    """Return the description of calibration data: tokens and the texts' SHA-256, as far as they are known."""
    if isinstance(calibration, Statistics):
        return {"tokens": calibration.tokens, "texts": calibration.texts}
    return {"tokens": None, "texts": {}}


def versions() -> dict[str, str]:
    """Return the versions of the packages that the result depends on."""
    return {"gluprune": __version__, **{name: _version(name) for name in ("torch", "transformers")}}


# Each is read from a file: together a tenth of the time of pruning a small model.
_version = cache(version)
