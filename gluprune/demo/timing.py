"""Speed of several models, timed in turns, so that a temporary load on the machine does not distort the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gluprune.io.progress import progress
from gluprune.measure.decoding import make_generator, time_generator


@dataclass(frozen=True)
class Speed:
    """The best of several rounds."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def time_in_turns(models: dict[int, Any], prompt: torch.Tensor, new_tokens: int, rounds: int) -> dict[int, Speed]:
    """Time greedy generation at a forced length, running every model once per round.

    Args:
        models: Intermediate size -> causal LM in eval mode.
        prompt: int64 `[1, S]`.
        new_tokens: At least 2.
        rounds: Timed runs of each model; the fastest counts.

    Returns:
        Intermediate size -> speed.
    """
    generators = {width: make_generator("generate", model, prompt, new_tokens) for width, model in models.items()}
    ttfts, tpots = ({width: [] for width in models} for _ in range(2))
    with progress(total=rounds * len(models), unit="run", desc="speed") as bar:
        for _ in range(rounds):
            for width, generator in generators.items():
                timing = time_generator(generator, [prompt.to(models[width].device)], new_tokens)
                ttfts[width].append(timing.ttft)
                tpots[width].append(timing.tpot)
                bar.update()
    return {width: Speed(prompt.numel() / min(ttfts[width]), 1 / min(tpots[width])) for width in models}
