"""`gluprune perplexity`."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer

from gluprune.cli.options import Device, Dtype, DtypeName, Fields, Json, Length, Model, Quiet, Verbose
from gluprune.io.text import fingerprints, read_texts

logger = logging.getLogger(__name__)

EXAMPLES = (
    "gluprune perplexity meta-llama/Llama-3.2-1B --text notes.txt",
    "gluprune perplexity llama-narrow --text notes.txt mails.jsonl --windows 64",
)


def run(
    model: Model,
    *,
    text: Annotated[
        list[str],
        typer.Option(
            metavar="FILE...",
            help="Texts to measure on, as for `calibrate --text`. Not those that the model was calibrated on.",
            show_default=False,
        ),
    ],
    windows: Annotated[
        int | None,
        typer.Option(metavar="N", help="Windows from each text, evenly spread. By default all of the text."),
    ] = None,
    length: Length = 512,
    field: Fields = ["text"],  # noqa: B006
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity on text.

    Cuts each text into windows, which begin with BOS if the tokenizer begins texts with it, and predicts every token
    from those before it in its window. On a CPU, with --dtype auto, weights in half precision are converted
    to float32.
    """
    texts = read_texts(text, field)

    import torch

    from gluprune.calibration.batches import begin_token
    from gluprune.checkpoints.card import read_history
    from gluprune.cli.calibration import computing_dtype, load_model, load_tokenizer
    from gluprune.measure.perplexity import cut_windows, perplexity
    from gluprune.models.device import choose_device

    choose_device(device)
    tokenizer = load_tokenizer(model)
    begin = begin_token(tokenizer)
    ids = [torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False).input_ids) for content in texts]
    cut = [cut_windows(tokens, length, windows, begin) for tokens in ids]  # raises before the model is loaded
    history = read_history(model)
    used = history.digests if history else set()
    for source, content in zip(text, texts, strict=True):
        if used.intersection(fingerprints([source], [content]).values()):
            logger.warning("%s was used to prune or train %s: the perplexity on other text is higher", source, model)
    loaded = load_model(model, device=device, dtype=computing_dtype(dtype, device))
    rows = []
    for source, tokens, chunks in zip(text, ids, cut, strict=True):
        value = perplexity(loaded, tokens, length, windows=windows, begin=begin)
        predicted = sum(chunk.numel() - 1 for chunk in chunks)
        rows.append({"text": source, "perplexity": value, "windows": len(chunks), "tokens": predicted})
        if not as_json:
            count = f"{len(chunks):,} window" + ("s" if len(chunks) > 1 else "")
            print(f"{source}: perplexity {value:.2f} on {predicted:,} tokens, in {count} of {length}")
    if as_json:
        print(json.dumps({"model": model, "length": length, "texts": rows}))
