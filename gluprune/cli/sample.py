"""`gluprune sample`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gluprune.cli.options import Device, Dtype, DtypeName, Json, Model, NewFile, Quiet, Verbose, new_file

EXAMPLES = ("gluprune sample meta-llama/Llama-3.2-1B --windows 64 --out own.txt",)


def run(
    model: Model,
    *,
    out: NewFile,
    windows: Annotated[int, typer.Option(metavar="N", help="Number of texts.")] = 64,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens per text.")] = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Let a model write calibration text.

    The text is sampled at temperature 1 from the full distribution. Pass it to `prune --calibration` or --text,
    with your own text or without it.
    """
    new_file(out)

    from transformers import AutoTokenizer

    from gluprune.calibration.sample import sample_text
    from gluprune.cli.calibration import computing_dtype, load_model
    from gluprune.io.atomic import write_file

    loaded = load_model(model, device=device, dtype=computing_dtype(dtype, device))
    text = sample_text(loaded, AutoTokenizer.from_pretrained(model), windows, length, seed=seed)
    write_file(out, [text.encode()])
    result = {"windows": windows, "tokens": windows * length, "file": str(out)}
    print(json.dumps(result) if as_json else f"{out}: {windows} texts, {result['tokens']:,} tokens")
