"""`gluprune reconstruct`."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer

from gluprune.cli.options import Json, NewFolder, Quiet, Texts, Verbose

logger = logging.getLogger(__name__)

EXAMPLES = (
    "gluprune reconstruct llama-narrow --dense meta-llama/Llama-3.2-1B --text notes.txt \\\n"
    "   --out llama-reconstructed",
)


def run(
    pruned: Annotated[
        str, typer.Argument(metavar="PRUNED", help="Pruned model: folder or Hub id.", show_default=False)
    ],
    *,
    dense: Annotated[
        str, typer.Option(metavar="MODEL", help="The model before pruning: folder or Hub id.", show_default=False)
    ],
    text: Texts,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows of 512 tokens from each text.")] = 32,
    out: NewFolder,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Refit a pruned model to match the dense one.

    Refits the down projections in order, so that each layer's output on the texts matches the dense model's. Loads both
    models.
    """
    from gluprune.checkpoints.load_save import load, save
    from gluprune.cli.calibration import load_with_batches
    from gluprune.io.atomic import check_destination
    from gluprune.pruning.reconstruct import reconstruct

    check_destination(out)
    model, tokenizer, batches = load_with_batches(pruned, text, windows)
    logger.info("loading %s", dense)
    reconstruct(model, load(dense), batches)
    save(model, out, tokenizer)
    result = {"windows": sum(map(len, batches)), "tokens": sum(batch.numel() for batch in batches), "folder": out}
    line = f"{out}: reconstructed on {result['windows']} windows, {result['tokens']:,} tokens"
    print(json.dumps(result) if as_json else line)
