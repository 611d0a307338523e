"""`gluprune prune`."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer

from gluprune.cli.options import Device, Dtype, DtypeName, Fields, Json, Model, NewFolder, Quiet, Verbose, parse_layers
from gluprune.io.text import read_texts

logger = logging.getLogger(__name__)

RESUMING = "to continue, run it again with --resume"
EXAMPLES = (
    "gluprune prune meta-llama/Llama-3.2-1B --pruning-ratio 0.2 --out llama-narrow",
    "gluprune calibrate meta-llama/Llama-3.2-1B --text notes.txt --sensitivity --out llama.stats\n"
    "gluprune prune meta-llama/Llama-3.2-1B --pruning-ratio 0.2 --out llama-better \\\n"
    "   --score surgeon --compensate --statistics llama.stats",
)
_TARGET, _RECIPE, _STREAMING = "Target (exactly one)", "Recipe", "Streaming (without --calibration)"


ExpansionRatio = Annotated[
    float | None,
    typer.Option(metavar="R", help="Intermediate size divided by hidden size.", rich_help_panel=_TARGET),
]
PruningRatio = Annotated[
    float | None, typer.Option(metavar="P", help="Fraction of neurons to remove.", rich_help_panel=_TARGET)
]
IntermediateSize = Annotated[
    int | None, typer.Option(metavar="N", help="Number of neurons to keep.", rich_help_panel=_TARGET)
]
Score = Annotated[
    str,
    typer.Option(
        metavar="SCORE",
        help="How neurons are ranked: maw_gud, maw (= ppm, the paper's), vow, pon, l2; with calibration data also"
        " activation, hybrid, surgeon.",
        rich_help_panel=_RECIPE,
    ),
]
Compensate = Annotated[
    bool,
    typer.Option(
        "--compensate",
        help="Refit down_proj to the remaining neurons on the calibration text.",
        rich_help_panel=_RECIPE,
    ),
]
Allocation = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="uniform: every layer has the same width. sensitivity: layers to which the loss is sensitive are"
        " wider; needs --statistics.",
        rich_help_panel=_RECIPE,
    ),
]
MultipleOf = Annotated[
    int,
    typer.Option(metavar="N", help="Round widths to the nearest multiple of N.", rich_help_panel=_RECIPE),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Prune only these layers, for example 0,2,5-7. By default all.",
        rich_help_panel=_RECIPE,
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE...",
        help="Texts to calibrate on, as for `calibrate --text`. Loads the whole model.",
        rich_help_panel=_RECIPE,
    ),
]
Statistics = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Statistics written by `gluprune calibrate`, used instead of texts.",
        rich_help_panel=_RECIPE,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the result without writing it.", rich_help_panel=_STREAMING)
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=_STREAMING)]


def run(
    source: Model,
    *,
    out: NewFolder,
    expansion_ratio: ExpansionRatio = None,
    pruning_ratio: PruningRatio = None,
    intermediate_size: IntermediateSize = None,
    score: Score = "maw_gud",
    compensate: Compensate = False,
    allocation: Allocation = "uniform",
    multiple_of: MultipleOf = 128,
    layers: Layers = None,
    calibration: Calibration = None,
    statistics: Statistics = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    field: Fields = ["text"],  # noqa: B006
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint with narrower MLPs.

    Reads and writes shard by shard, so that memory holds one layer at a time. With --calibration it loads the
    whole model and runs it on the texts.
    """
    from gluprune.pruning.recipe import Recipe

    target = {
        "expansion_ratio": expansion_ratio,
        "pruning_ratio": pruning_ratio,
        "intermediate_size": intermediate_size,
        "layers": None if layers is None else parse_layers(layers),
    }
    recipe = Recipe(score=score, compensate=compensate, allocation=allocation, multiple_of=multiple_of)
    _check(recipe, calibration, statistics)
    if calibration:
        if dry_run or resume or statistics:
            raise ValueError("--dry-run, --resume and --statistics work only without --calibration")
        report = _prune_in_memory(
            source, out, recipe, target=target, texts=read_texts(calibration, field), device=device, dtype=dtype
        )
    else:
        used = {"--field": field != ["text"], "--device": device != "auto", "--dtype": dtype is not DtypeName.AUTO}
        for flag in (flag for flag, is_given in used.items() if is_given):
            raise ValueError(f"{flag} needs --calibration FILE")
        from gluprune.checkpoints.stream import prune_checkpoint

        report = prune_checkpoint(
            source,
            out,
            **target,
            **recipe.options(),
            statistics=statistics,
            dry_run=dry_run,
            resume=resume,
        )
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        print(report, "dry run: nothing was written" if dry_run else out, sep="\n")


def _check(recipe, calibration: list[str] | None, statistics: str | None) -> None:
    """Raise ValueError where the recipe needs calibration data that is missing, naming the flags."""
    if recipe.needs.calibration and not (calibration or statistics):
        name, _, value = recipe.needs.argument.partition("=")
        flag = f"--{name}" if value == "True" else f"--{name} {value[1:-1]}"
        files = "--statistics FILE" if recipe.allocation == "sensitivity" else "--calibration FILE or --statistics FILE"
        raise ValueError(f"{flag} needs {files}")
    if recipe.allocation == "sensitivity" and calibration:
        raise ValueError(
            "--allocation sensitivity needs --statistics FILE, written by gluprune calibrate --sensitivity"
        )


def _prune_in_memory(source: str, out: str, recipe, *, target: dict, texts: list[str], device: str, dtype: DtypeName):
    from gluprune.checkpoints.load_save import save
    from gluprune.cli.calibration import load_with_batches
    from gluprune.io.atomic import check_destination
    from gluprune.pruning.prune import prune

    check_destination(out)
    model, tokenizer, batches = load_with_batches(source, texts, windows=128, length=512, device=device, dtype=dtype)
    report = prune(model, **target, **recipe.options(), calibration=batches)
    logger.info("writing %s", out)
    save(model, out, tokenizer)
    return report
