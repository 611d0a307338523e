"""`gluprune heal`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gluprune.cli.options import (
    RUNNING,
    TEXT,
    DenseModel,
    Fields,
    Json,
    NewFolder,
    PrunedModel,
    Quiet,
    TestTexts,
    Verbose,
    check_texts,
)

RESUMING = "to continue, run it again"
EXAMPLES = (
    "gluprune heal llama-narrow --teacher meta-llama/Llama-3.2-1B --text notes.txt --out llama-healed",
    "gluprune heal llama-narrow --teacher meta-llama/Llama-3.2-1B --train lora --out llama-healed",
)
_TRAINING = "Training"


def run(
    pruned: PrunedModel,
    *,
    teacher: DenseModel,
    out: NewFolder,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="Texts to train on, as for `calibrate --text`; by default wikipedia.",
            rich_help_panel=TEXT,
            callback=check_texts,
        ),
    ] = None,
    test_text: TestTexts = None,
    own_windows: Annotated[
        int,
        typer.Option(metavar="N", help="Windows of text that the teacher writes; 0: none.", rich_help_panel=TEXT),
    ] = 64,
    field: Fields = ["text"],  # noqa: B006
    tokens: Annotated[
        int,
        typer.Option(metavar="N", help="Train on about N tokens; shorter texts repeat.", rich_help_panel=_TRAINING),
    ] = 1_000_000,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens per window.", rich_help_panel=_TRAINING)] = 512,
    batch: Annotated[
        int, typer.Option(metavar="N", help="Windows per step, over all processes.", rich_help_panel=_TRAINING)
    ] = 16,
    device_batch: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Windows that a process runs at a time, at most; fewer need less memory.",
            rich_help_panel=_TRAINING,
        ),
    ] = 4,
    learning_rate: Annotated[
        float,
        typer.Option(metavar="X", help="At its peak; it then falls along a cosine.", rich_help_panel=_TRAINING),
    ] = 1e-4,
    train: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="all; mlp: the MLPs and all norms; lora: low-rank updates, merged at the end.",
            rich_help_panel=_TRAINING,
        ),
    ] = "all",
    hidden_weight: Annotated[
        float,
        typer.Option(metavar="X", help="Factor of the error of hidden states in the loss.", rich_help_panel=_TRAINING),
    ] = 0.0,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="cpu or cuda; auto is cuda if available, otherwise cpu.", rich_help_panel=RUNNING
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Dtype to compute in: float32, bfloat16; auto is float32 on a CPU, otherwise bfloat16. Trained"
            " weights are in float32.",
            rich_help_panel=RUNNING,
        ),
    ] = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train a pruned model to predict what the dense one does.

    Distils from the dense model on text that it writes and on yours or Wikipedia, and measures perplexity before and
    after on text held apart. Runs in several processes under `accelerate launch` or `torchrun`. An interrupted run
    continues when the same command is run again.
    """
    from gluprune.workflow.heal import heal

    report = heal(
        pruned,
        teacher,
        out,
        text=text or (),
        test_text=test_text or (),
        fields=field,
        own_windows=own_windows,
        tokens=tokens,
        length=length,
        batch=batch,
        device_batch=device_batch,
        learning_rate=learning_rate,
        train=train,
        hidden_weight=hidden_weight,
        device=device,
        dtype=dtype,
    )
    if report is not None:
        print(json.dumps(report.to_dict()) if as_json else report)
