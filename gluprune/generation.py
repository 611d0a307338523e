"""Timing of generation at a forced length: prefill and decode apart, so that longer output never looks like slower tokens."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True)
class GenerationTiming:
    """Medians over the repeats, in seconds.

    ttft: time to first token (prefill and the first sampling step).
    tpot: time per output token after the first.
    ttlt: time to last token.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    ttft: float
    tpot: float
    ttlt: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.batch * self.prompt_tokens / self.ttft

    @property
    def decode_tokens_per_second(self) -> float:
        return self.batch / self.tpot


class _Clock(StoppingCriteria):
    """Never stops; notes when each token is there (generate calls it once a token)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def time_generation(model, prompt: torch.Tensor, new_tokens: int, repeats: int = 3) -> GenerationTiming:
    """Time greedy `generate` with exactly `new_tokens` tokens, after one warm-up.

    Args:
        model: a causal LM in eval mode.
        prompt: int64 `[B, S]`, no padding.
        new_tokens: at least 2; end-of-sequence does not stop the generation.
        repeats: timed runs.

    Raises:
        ValueError: fewer than two new tokens.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2 to tell prefill from decode, got {new_tokens}")
    prompt = prompt.to(model.device)

    def run() -> tuple[float, float]:
        clock = _Clock(model.device)
        start = clock.now()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return clock.times[0] - start, clock.times[-1] - start

    run()
    runs = [run() for _ in range(repeats)]
    return GenerationTiming(
        batch=prompt.shape[0],
        prompt_tokens=prompt.shape[1],
        new_tokens=new_tokens,
        ttft=statistics.median(first for first, _ in runs),
        tpot=statistics.median((last - first) / (new_tokens - 1) for first, last in runs),
        ttlt=statistics.median(last for _, last in runs),
    )
