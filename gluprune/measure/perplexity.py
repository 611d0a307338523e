"""Perplexity of a causal LM on a text."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F


def windows(ids: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """Yield consecutive windows `[1, length + 1]` of token ids `[T]`; the last has at least two tokens."""
    for start in range(0, ids.numel() - 1, length):
        yield ids[start : start + length + 1].unsqueeze(0)


@torch.no_grad()
def perplexity(model, ids: torch.Tensor, window: int = 512) -> float:
    """Return exp of the mean negative log-likelihood per token, over consecutive windows.

    Every token but the first is predicted once; the last token of a window is the first of the next.

    Args:
        model: A causal LM in eval mode.
        ids: int64 `[T]`, T >= 2.
        window: Maximum number of tokens of context.

    Raises:
        ValueError: Fewer than two tokens.
    """
    if ids.numel() < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {ids.numel()}")
    total = 0.0
    for chunk in windows(ids.to(model.device), window):
        logits = model(chunk[:, :-1]).logits[0].float()
        total += F.cross_entropy(logits, chunk[0, 1:], reduction="sum").item()
    return math.exp(total / (ids.numel() - 1))
