"""`gluprune shrink`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gluprune.cli.options import (
    RECIPE,
    TEXT,
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
    TestTexts,
    Verbose,
    check_texts,
)

RESUMING = "to continue, run it again"
EXAMPLES = (
    "gluprune shrink meta-llama/Llama-3.2-1B --ratio 0.2 --out llama-narrow",
    "gluprune shrink meta-llama/Llama-3.2-1B --max-loss 0.2 --text notes.txt --out llama-narrow",
)
_TARGET = "Target (exactly one)"


def run(
    model: Model,
    *,
    out: NewFolder,
    pruning_ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio", metavar="P", help="Fraction of neurons to remove.", show_default=False, rich_help_panel=_TARGET
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Choose the narrowest width whose perplexity is at most this much above dense: 0.2 is 20 %, and 1 the"
            " most. Prunes and measures several widths.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="Texts of your domain to calibrate on, as for `calibrate --text`; by default wikipedia.",
            rich_help_panel=TEXT,
            callback=check_texts,
        ),
    ] = None,
    test_text: TestTexts = None,
    own_windows: Annotated[
        int,
        typer.Option(metavar="N", help="Windows of text that the model writes itself; 0: none.", rich_help_panel=TEXT),
    ] = 64,
    windows: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Windows of each text to calibrate on, the model's own included.",
            rich_help_panel=TEXT,
        ),
    ] = 128,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens per window.", rich_help_panel=TEXT)] = 512,
    field: Fields = ["text"],  # noqa: B006
    allocation: Allocation = "uniform",
    multiple_of: MultipleOf = 128,
    deploy: Deploy = None,
    heal_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Then train the chosen model on about N tokens, as `gluprune heal` does; 0: not at all.",
            rich_help_panel=RECIPE,
        ),
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model by the recommended recipe.

    Calibrates on text that the model writes and on yours or Wikipedia, prunes, reconstructs, and measures perplexity
    before and after on text held apart. Writes a checkpoint with a model card and a picture. An interrupted run
    continues when the same command is run again.
    """
    from gluprune.workflow.shrink import shrink

    report = shrink(
        model,
        out,
        pruning_ratio=pruning_ratio,
        max_loss=max_loss,
        text=text or (),
        test_text=test_text or (),
        fields=field,
        own_windows=own_windows,
        windows=windows,
        length=length,
        allocation=allocation,
        multiple_of=multiple_of,
        deploy=deploy,
        heal_tokens=heal_tokens,
        device=device,
        dtype=dtype.value,
    )
    print(json.dumps(report.to_dict()) if as_json else report)
