"""Perplexity of a causal LM on a text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from gluprune.calibration.batches import check_vocabulary, holds_integers
from gluprune.calibration.running import evaluating
from gluprune.io.progress import progress
from gluprune.models.glu import check_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cut_windows(
    ids: torch.Tensor, length: int, windows: int | None = None, begin: int | None = None
) -> list[torch.Tensor]:
    """Return consecutive windows `[length + 1]` of token ids; the last may be shorter, with at least two tokens.

    The last token of a window is the first of the next, so that every token but the first is predicted once. With
    `begin`, every window is that token and the next `length` of the text, all of which are predicted.

    Args:
        ids: int64 `[T]`, T >= 2.
        length: Tokens of context, at most.
        windows: Return at most this many of them, evenly spread. None: all.
        begin: Token id that begins every window (see `begin_token`), or None.

    Raises:
        ValueError: Fewer than two tokens, or a number below 1.
    """
    for name, value in {"length": length, "windows": windows}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if ids.numel() < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {ids.numel()}")
    starts = range(0, ids.numel() - (begin is None), length)
    count = len(starts) if windows is None else min(windows, len(starts))
    chosen = (starts[number * len(starts) // count] for number in range(count))
    if begin is not None:
        return [F.pad(ids[start : start + length], (1, 0), value=begin) for start in chosen]
    return [ids[start : start + length + 1] for start in chosen]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    ids: torch.Tensor,
    length: int = 512,
    *,
    windows: int | None = None,
    begin: int | None = None,
) -> float:
    """Return exp of the mean negative log-likelihood per token of a text, over consecutive windows.

    Args:
        model: A causal LM; it runs on its device, in its dtype and in eval mode.
        ids: Integers `[T]` or `[1, T]`, the token ids of the text, T >= 2.
        length: Tokens of context, at most.
        windows: Measure on at most this many windows, evenly spread over the text. None: on all of it.
        begin: Token id before every window. Give the tokenizer's BOS if it begins texts with one, and `ids` without
            it: models such as Llama 3 and Gemma expect it.

    Returns:
        The perplexity.

    Raises:
        TypeError: `ids` is not a tensor.
        ValueError: Fewer than two tokens, ids of another shape or outside the vocabulary, a number below 1, or a model
            without a language-model head.

    Example:
        >>> import gluprune
        >>> from transformers import AutoTokenizer
        >>> model, tokenizer = gluprune.load(model_path), AutoTokenizer.from_pretrained(model_path)
        >>> ids = tokenizer("A long text. " * 100, return_tensors="pt").input_ids
        >>> gluprune.perplexity(model, ids, windows=2) > 1
        True
    """
    check_head(model, "perplexity")
    chunks = cut_windows(_one_row(model, ids).to(model.device), length, windows, begin)
    total = tokens = 0
    with evaluating(model):
        for chunk in progress(chunks, desc="perplexity", unit="window", delay=1):  # no bar if it takes no time
            logits = model(chunk[None, :-1]).logits[0].float()
            total += F.cross_entropy(logits, chunk[1:], reduction="sum").item()
            tokens += chunk.numel() - 1
    return math.exp(total / tokens)


def _one_row(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return token ids as int64 `[T]`, checked."""
    if not isinstance(ids, torch.Tensor):
        hint = "tokenizer(text, return_tensors='pt').input_ids"
        raise TypeError(f"ids must be a tensor of token ids, got {type(ids).__name__}: give {hint}")
    row = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if row.dim() != 1 or not holds_integers(row):
        raise ValueError(f"ids must be integers of shape [T] or [1, T], got {ids.dtype} of shape {list(ids.shape)}")
    check_vocabulary(model, row, "ids go")
    return row.long()
