"""Options and work that `eval` and `study` share."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gluprune.cli.options import RUNNING, DtypeName, require

_DOCUMENTS = "Documents"


class Budget(StrEnum):
    """Budgets for the number of documents."""

    SMALL = "small"


Tasks = Annotated[
    list[str],
    typer.Option(metavar="TASK...", help="base (13 tasks), instruct (7 tasks) or task names."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of local files to use instead of the Hub's data.", rich_help_panel=_DOCUMENTS
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Run N documents of each task, chosen with a fixed seed.", rich_help_panel=_DOCUMENTS
    ),
]
SmallBudget = Annotated[
    Budget | None,
    typer.Option(
        metavar="small",
        help="A fixed, seeded subset of every task, sized for 2 CPU cores; cannot be combined with --limit.",
        rich_help_panel=_DOCUMENTS,
    ),
]
LogSamples = Annotated[
    bool,
    typer.Option("--log-samples", help="Save requests, answers and generated lengths.", rich_help_panel=_DOCUMENTS),
]
Patch = Annotated[bool, typer.Option("--patch", help="Run with gluprune.patch_llama.", rich_help_panel=RUNNING)]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Evaluate a checkpoint with an lm-eval backend: hf, vllm, ...",
        rich_help_panel=RUNNING,
    ),
]
ModelArgs = Annotated[
    str,
    typer.Option(
        metavar="KEY=VALUE,...", help="Arguments for the backend.", rich_help_panel=RUNNING, show_default=False
    ),
]


@dataclass(frozen=True)
class Options:
    """The options that `eval` and `study` share."""

    out: Path
    tasks: Sequence[str]
    data: Path | None
    limit: int | None
    budget: Budget | None
    device: str
    dtype: DtypeName
    patch: bool
    backend: str | None
    model_args: str
    log_samples: bool
    as_json: bool


def evaluate(
    models: Sequence[str],
    configurations: Sequence,
    options: Options,
    calibration: Sequence[str] = (),
    windows: int | None = None,
) -> None:
    """Run the study on these models and configurations, with these calibration texts, and print its results."""
    from gluprune_evals.folder import Folder, StudyModel
    from gluprune_evals.study import Settings, run
    from gluprune_evals.summary import summary
    from gluprune_evals.tasks import Limits

    calibrated = {"calibration": tuple(calibration), "windows": windows} if calibration else {}
    settings = Settings(
        limits=Limits(options.limit, small=options.budget is not None),
        data=options.data,
        device=options.device,
        dtype=options.dtype.value,
        patch=options.patch,
        backend=options.backend,
        model_args=options.model_args,
        log_samples=options.log_samples,
        **calibrated,
    )
    studied = [StudyModel.find(model) for model in models]
    with contextlib.redirect_stdout(sys.stderr):  # lm-eval and its backends print
        results = run(Folder(options.out), studied, configurations, task_names(options.tasks), settings)
    if options.as_json:
        print(json.dumps([json.loads(result.to_json()) for result in results]))
    else:
        print(summary(results), options.out, sep="\n")


def task_names(given: Sequence[str]) -> list[str]:
    """Return the names of the tasks of `--tasks`.

    Raises:
        ValueError: One is unknown.
    """
    from gluprune_evals.tasks import BASE_TASKS, INSTRUCT_TASKS, check_tasks

    lists = {"base": BASE_TASKS, "instruct": INSTRUCT_TASKS}
    try:
        return check_tasks(task for name in given for task in lists.get(name, (name,)))
    except ValueError as error:
        raise ValueError(f"{error}; or a list: {', '.join(lists)}") from None


def require_evaluation(tasks: Sequence[str], backend: str | None) -> None:
    """Check that the tasks exist and that the packages that they and this backend need are installed.

    Raises:
        ValueError: A task is unknown.
        ImportError: A package is missing; the message names the extra, or the package of the backend.
    """
    task_names(tasks)
    require("eval", "lm_eval", "scipy")
    if {"ifeval", "base", "instruct"} & set(tasks):
        require("eval", "langdetect", "immutabledict", "nltk")
    if backend in ("vllm", "sglang") and importlib.util.find_spec(backend) is None:
        raise ImportError(f"--backend {backend} needs the package {backend}, which is not installed")
