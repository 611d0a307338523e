"""`gluprune reconstruct`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gluprune.cli.options import (
    DenseModel,
    Device,
    Dtype,
    DtypeName,
    Fields,
    Json,
    Length,
    NewFolder,
    PrunedModel,
    Quiet,
    Texts,
    Verbose,
)
from gluprune.io.text import read_texts

EXAMPLES = (
    "gluprune reconstruct llama-narrow --dense meta-llama/Llama-3.2-1B --text notes.txt \\\n"
    "   --out llama-reconstructed",
)


def run(
    pruned: PrunedModel,
    *,
    dense: DenseModel,
    text: Texts,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows from each text.")] = 64,
    length: Length = 512,
    field: Fields = ["text"],  # noqa: B006
    out: NewFolder,
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Refit a pruned model to match the dense one.

    Refits the down projections in order, so that each layer's output on the texts matches the dense model's. Loads both
    models.
    """
    texts = read_texts(text, field)

    from gluprune.checkpoints.load_save import save_like
    from gluprune.cli.calibration import load_model, load_with_batches
    from gluprune.io.hub import local_folder
    from gluprune.pruning.reconstruct import reconstruct

    folder = local_folder(pruned)
    model, _, batches = load_with_batches(
        str(folder),
        texts,
        windows=windows,
        length=length,
        device=device,
        dtype=dtype,
    )
    reconstruct(model, load_model(dense, device=device, dtype=dtype), batches)
    save_like(model, out, folder)
    result = {"windows": sum(map(len, batches)), "tokens": sum(batch.numel() for batch in batches), "folder": out}
    line = f"{out}: reconstructed on {result['windows']} windows, {result['tokens']:,} tokens"
    print(json.dumps(result) if as_json else line)
