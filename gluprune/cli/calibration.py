"""The model and the calibration batches of the commands that calibrate."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from gluprune.calibration.batches import batches_from_text
from gluprune.checkpoints.load_save import load, read_config
from gluprune.cli.options import DtypeName
from gluprune.models.device import choose_device, loading_options

logger = logging.getLogger(__name__)


def computing_dtype(dtype: DtypeName, device: str) -> DtypeName:
    """Return the dtype to compute with: half precision is slow on most CPUs, so `auto` is float32 there."""
    is_slow = dtype is DtypeName.AUTO and choose_device(device).type == "cpu"
    return DtypeName.FLOAT32 if is_slow else dtype


def load_model(source: str, *, device: str, dtype: DtypeName):
    """Load a model in a dtype onto a device, in eval mode.

    Raises:
        ValueError: There is no such model or no such device.
    """
    options = loading_options(device)
    logger.info("loading %s", source)
    return load(source, dtype=dtype.value, **options).eval()


def load_tokenizer(source: str):
    """Load the tokenizer of a model, whose config is checked: transformers asks about code in it before it fails."""
    from transformers import AutoTokenizer

    read_config(source)
    return AutoTokenizer.from_pretrained(source)


def load_with_batches(
    source: str, texts: Sequence[str], *, windows: int, length: int, device: str, dtype: DtypeName
) -> tuple:
    """Load a model and its tokenizer, and cut up to `windows` windows of `length` tokens from each text.

    Returns:
        The model, the tokenizer and the batches.
    """
    choose_device(device)
    tokenizer = load_tokenizer(source)
    batches: list[torch.Tensor] = batches_from_text(tokenizer, texts, windows, length)
    model = load_model(source, device=device, dtype=dtype)
    logger.info("calibrating on %d windows", sum(map(len, batches)))
    return model, tokenizer, batches
