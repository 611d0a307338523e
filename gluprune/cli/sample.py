"""`gluprune sample`."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

import typer

from gluprune.cli.options import Json, Model, NewFile, Quiet, Verbose, new_file

logger = logging.getLogger(__name__)

EXAMPLES = ("gluprune sample meta-llama/Llama-3.2-1B --windows 64 --out own.txt",)


def run(
    model: Model,
    *,
    out: NewFile,
    windows: Annotated[int, typer.Option(metavar="N", help="Number of texts.")] = 64,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens per text.")] = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sampling.")] = 0,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Let a model write calibration text.

    The text is sampled at temperature 1 from the full distribution. Pass it to `prune --calibration` or --text,
    with your own text or without it.
    """
    import torch
    from transformers import AutoTokenizer

    from gluprune.calibration.sample import sample_text
    from gluprune.checkpoints.load_save import load
    from gluprune.io.atomic import write_file

    new_file(out)
    logger.info("loading %s", model)
    # Half precision is slow on most CPUs.
    loaded: Any = load(model, dtype="auto" if torch.cuda.is_available() else torch.float32)
    if torch.cuda.is_available():
        loaded = loaded.cuda()
    text = sample_text(loaded, AutoTokenizer.from_pretrained(model), windows, length, seed=seed)
    write_file(out, [text.encode()])
    result = {"windows": windows, "tokens": windows * length, "file": str(out)}
    print(json.dumps(result) if as_json else f"{out}: {windows} texts, {result['tokens']:,} tokens")
