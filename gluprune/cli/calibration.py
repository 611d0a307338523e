"""The model and the calibration batches of the commands that read text files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from gluprune.calibration.batches import batches_from_text
from gluprune.checkpoints.load_save import load

logger = logging.getLogger(__name__)


def load_with_batches(source: str, files: Sequence[str], windows: int = 128):
    """Load a model and its tokenizer, and cut up to `windows` windows from each text file.

    Returns:
        The model, the tokenizer and the batches.
    """
    from transformers import AutoTokenizer

    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    logger.info("loading %s", source)
    model = load(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    batches = batches_from_text(tokenizer, texts, windows)
    logger.info("calibrating on %d windows of %s", sum(map(len, batches)), ", ".join(files))
    return model, tokenizer, batches
