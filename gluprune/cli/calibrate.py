"""`gluprune calibrate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gluprune.cli.options import (
    Device,
    Dtype,
    DtypeName,
    Fields,
    Json,
    Length,
    Model,
    NewFile,
    Quiet,
    Texts,
    Verbose,
    new_file,
)
from gluprune.io.text import fingerprints, read_texts

EXAMPLES = (
    "gluprune calibrate meta-llama/Llama-3.2-1B --text notes.txt --out llama.stats",
    "gluprune calibrate meta-llama/Llama-3.2-1B --text notes.txt own.txt --sensitivity \\\n   --out llama.stats",
)


def run(
    model: Model,
    *,
    text: Texts,
    out: NewFile,
    gram: Annotated[
        bool,
        typer.Option(
            "--gram",
            help="Also collect the Gram matrices that --compensate needs: 4 bytes in the file for each pair of neurons"
            " of a layer.",
        ),
    ] = False,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Also collect what --score surgeon and --allocation sensitivity need. Implies --gram; runs the model"
            " backward as well.",
        ),
    ] = False,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows from each text.")] = 128,
    length: Length = 512,
    field: Fields = ["text"],  # noqa: B006
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Collect activation statistics on text.

    Runs the text through the model once and writes the statistics, which any number of `prune --statistics` runs can
    use.
    """
    new_file(out)
    texts = read_texts(text, field)

    from gluprune.calibration.collect import calibrate_to_file
    from gluprune.cli.calibration import load_with_batches
    from gluprune.models.glu import model_glus

    loaded, _, batches = load_with_batches(model, texts, windows=windows, length=length, device=device, dtype=dtype)
    gram = gram or sensitivity
    tokens = calibrate_to_file(
        loaded,
        batches,
        out,
        gram=gram,
        sensitivity=sensitivity,
        texts=fingerprints(text, texts),
    )
    result = {
        "layers": len(model_glus(loaded)),
        "tokens": tokens,
        "gram": gram,
        "sensitivity": sensitivity,
        "file": str(out),
    }
    if as_json:
        print(json.dumps(result))
    else:
        size = f"{out.stat().st_size:,} bytes"
        print(f"{out}: statistics of {result['layers']} layers on {tokens:,} tokens, {size}")
