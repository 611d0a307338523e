"""`gluprune study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gluprune.cli import evaluation
from gluprune.cli.options import Device, Dtype, DtypeName, Fields, Json, Quiet, Verbose, check_models
from gluprune.io.text import read_texts
from gluprune.measure.paper import RATIOS

RESUMING = "to continue, run it again"
EXAMPLES = (
    "gluprune study meta-llama/Llama-3.2-1B --budget small",
    "gluprune study meta-llama/Llama-3.2-1B --ratios 0.2 0.4 --scores maw hybrid+compensate \\\n"
    "   --calibration notes.txt --tasks wikitext arc_challenge",
)
MAY_BE_EMPTY = ("--ratios",)
_RATIOS = [str(ratio) for ratio in RATIOS]


def run(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model folders or Hub ids.", show_default=False, callback=check_models),
    ],
    *,
    ratios: Annotated[
        list[str],
        typer.Option(
            metavar="[P...]",
            help="Fractions of neurons to remove; with no value, only the dense models are scored.",
        ),
    ] = _RATIOS,
    scores: Annotated[
        list[str],
        typer.Option(metavar="SCORE...", help="Scores as in prune; SCORE+compensate also refits down_proj."),
    ] = ["maw"],  # noqa: B006
    multiple_of: Annotated[
        int, typer.Option(metavar="N", help="Round widths to a multiple of this; 1 keeps them exact.")
    ] = 1,
    calibration: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE...", help="Texts for the scores that need calibration, and for +compensate."),
    ] = None,
    calibration_windows: Annotated[int, typer.Option(metavar="N", help="Windows of 512 tokens from each text.")] = 128,
    field: Fields = ["text"],  # noqa: B006
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the results.")] = Path("study_output"),
    tasks: evaluation.Tasks = ["base"],  # noqa: B006
    data: evaluation.Data = None,
    limit: evaluation.Limit = None,
    budget: evaluation.SmallBudget = None,
    log_samples: evaluation.LogSamples = False,
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    patch: evaluation.Patch = False,
    backend: evaluation.Backend = None,
    model_args: evaluation.ModelArgs = "",
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Score models at several widths with lm-eval.

    Scores models dense and pruned: models x ratios x scores x tasks. An interrupted study continues
    when the same command is run again.
    """
    evaluation.require_evaluation(tasks, backend)
    chosen = [float(ratio) for ratio in ratios if ratio]
    unused = {"--scores": scores != ["maw"], "--multiple-of": multiple_of != 1, "--calibration": calibration}
    for flag in (flag for flag, is_given in unused.items() if is_given and not chosen):
        raise ValueError(f"{flag} would be ignored: --ratios has no value, so nothing is pruned")
    if calibration_windows != 128 and not calibration:
        raise ValueError("--calibration-windows needs --calibration FILE")
    texts = read_texts(calibration or (), field)
    from gluprune_evals.configuration import grid

    from gluprune.pruning.recipe import Recipe

    options = evaluation.Options(
        out=out,
        tasks=tasks,
        data=data,
        limit=limit,
        budget=budget,
        device=device,
        dtype=dtype,
        patch=patch,
        backend=backend,
        model_args=model_args,
        log_samples=log_samples,
        as_json=as_json,
    )
    recipes = [Recipe.parse(score, multiple_of=multiple_of) for score in scores]
    configurations = grid(chosen, recipes)
    evaluation.evaluate(models, configurations, options, texts, calibration_windows)
