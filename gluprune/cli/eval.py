"""`gluprune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gluprune.cli import evaluation
from gluprune.cli.options import Device, Dtype, DtypeName, Json, Model, Quiet, Verbose

RESUMING = "to continue, run it again"
EXAMPLES = (
    "gluprune eval meta-llama/Llama-3.2-1B --tasks arc_challenge piqa --limit 100",
    "gluprune eval meta-llama/Llama-3.2-1B --budget small",
)


def run(
    model: Model,
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the results.")] = Path("eval_output"),
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
    """Score one model with lm-eval.

    Runs the tasks of the paper. Results that the folder already holds are not computed again.
    """
    evaluation.require_evaluation(tasks, backend)
    from gluprune_evals.configuration import Configuration

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
    evaluation.evaluate([model], [Configuration()], options)
