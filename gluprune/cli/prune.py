"""`gluprune prune`."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from gluprune.cli.options import (
    OUTPUT,
    RECIPE,
    Allocation,
    Deploy,
    Device,
    Dtype,
    DtypeName,
    Fields,
    Json,
    Model,
    MultipleOf,
    NewFolder,
    Quiet,
    Verbose,
    parse_layers,
)
from gluprune.io.folder import remove_partial_folders
from gluprune.io.text import fingerprints, read_texts

logger = logging.getLogger(__name__)

RESUMING = "to continue, run it again with --resume"
EXAMPLES = (
    "gluprune prune meta-llama/Llama-3.2-1B --pruning-ratio 0.2 --out llama-narrow",
    "gluprune calibrate meta-llama/Llama-3.2-1B --text notes.txt --sensitivity --out llama.stats\n"
    "gluprune prune meta-llama/Llama-3.2-1B --pruning-ratio 0.2 --out llama-better \\\n"
    "   --score surgeon --compensate --statistics llama.stats",
)
_LAYERS_DIFFER = (
    "layers of different widths: `gluprune.load` loads the result, stock transformers does not;"
    " `gluprune export` writes it for servers"
)
_TARGET, _STREAMING = "Target (exactly one)", "Streaming (without --calibration)"


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
        rich_help_panel=RECIPE,
    ),
]
Compensate = Annotated[
    bool,
    typer.Option(
        "--compensate",
        help="Refit down_proj to the remaining neurons on the calibration text.",
        rich_help_panel=RECIPE,
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Prune only these layers, for example 0,2,5-7. By default all.",
        rich_help_panel=RECIPE,
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE...",
        help="Texts to calibrate on, as for `calibrate --text`. Loads the whole model.",
        rich_help_panel=RECIPE,
    ),
]
Statistics = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Statistics written by `gluprune calibrate`, used instead of texts.",
        rich_help_panel=RECIPE,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the result without writing it.", rich_help_panel=_STREAMING)
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=_STREAMING)]
Kept = Annotated[
    bool, typer.Option("--kept", help="With --json, also print the index of every kept neuron.", rich_help_panel=OUTPUT)
]
Clean = Annotated[
    bool,
    typer.Option("--clean", help="First remove what interrupted runs to this folder left.", rich_help_panel=OUTPUT),
]


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
    deploy: Deploy = None,
    layers: Layers = None,
    calibration: Calibration = None,
    statistics: Statistics = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    clean: Clean = False,
    field: Fields = ["text"],  # noqa: B006
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    kept: Kept = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint with narrower MLPs.

    Reads and writes shard by shard, so that memory holds one layer at a time. With --calibration it first loads the
    whole model, runs it on the texts and stores their statistics in the folder for temporary files.
    """
    from gluprune.pruning.recipe import Recipe

    target = {
        "expansion_ratio": expansion_ratio,
        "pruning_ratio": pruning_ratio,
        "intermediate_size": intermediate_size,
        "layers": None if layers is None else parse_layers(layers),
    }
    recipe = Recipe(score, compensate, allocation, multiple_of=multiple_of, deploy=deploy)
    _check(recipe, calibration, statistics, dry_run=dry_run, resume=resume, clean=clean)
    used = {"--field": field != ["text"], "--device": device != "auto", "--dtype": dtype is not DtypeName.AUTO}
    _check_needs({} if calibration else used, "--calibration FILE")
    _check_needs({} if as_json else {"--kept": kept}, "--json")
    texts = dict(zip(calibration or (), read_texts(calibration or (), field), strict=True))

    from gluprune.checkpoints.stream import prune_checkpoint

    if clean:
        for folder in remove_partial_folders(out):
            logger.warning("removed %s", folder)
    options: dict = {**target, "dry_run": dry_run, "resume": resume}
    with ExitStack() as stack:
        if texts:
            # Everything that can be refused is refused before the model is loaded.
            prune_checkpoint(source, out, **target, multiple_of=recipe.width_multiple, deploy=deploy, dry_run=True)
            folder = stack.enter_context(TemporaryDirectory(prefix="gluprune-"))
            file = Path(folder) / "statistics"
            statistics = _calibrate(source, texts, recipe, file, device=device, dtype=dtype)
        report = prune_checkpoint(source, out, **options, **recipe.options(), statistics=statistics)
    if report.differ:
        logger.warning(_LAYERS_DIFFER)
    print(_as_json(report, kept) if as_json else f"{report}\n{'dry run: nothing was written' if dry_run else out}")


def _as_json(report, kept: bool) -> str:
    """Return a report as JSON, with the kept neurons or without."""
    fields = report.to_dict()
    return json.dumps(fields if kept else {name: value for name, value in fields.items() if name != "kept"})


def _check(
    recipe, calibration: list[str] | None, statistics: str | None, *, dry_run: bool, resume: bool, clean: bool
) -> None:
    """Raise ValueError for options that contradict each other or that would be ignored, naming the flags."""
    if calibration and (dry_run or resume or statistics):
        raise ValueError("--dry-run, --resume and --statistics work only without --calibration")
    if clean and (dry_run or resume):
        raise ValueError("--clean removes what --resume continues, and --dry-run changes nothing: give one of them")
    given = {"--calibration": calibration, "--statistics": statistics}
    recipe.check_data([flag for flag, value in given.items() if value], "--calibration FILE or --statistics FILE")


def _check_needs(given: dict[str, bool], needed: str) -> None:
    """Raise ValueError for the first flag that is given without what it needs."""
    for flag in (flag for flag, is_given in given.items() if is_given):
        raise ValueError(f"{flag} needs {needed}")


def _calibrate(source: str, texts: dict[str, str], recipe, file: Path, *, device: str, dtype: DtypeName) -> str:
    """Write the statistics that a recipe needs of a model on texts, by source; return the name of the file."""
    from gluprune.calibration.collect import calibrate_to_file
    from gluprune.cli.calibration import load_with_batches

    model, _, batches = load_with_batches(
        source,
        list(texts.values()),
        windows=128,
        length=512,
        device=device,
        dtype=dtype,
    )
    calibrate_to_file(
        model,
        batches,
        file,
        gram=recipe.needs.gram,
        sensitivity=recipe.needs.sensitivity,
        texts=fingerprints(list(texts), list(texts.values())),
    )
    return str(file)
