"""Timing of generation at a forced length: prefill and decode apart, so that longer output never looks like slower tokens.

Three ways of decoding (`DECODINGS`) give the same greedy tokens and differ in what a token costs besides its arithmetic:
"generate" is what users call, and launches every kernel from Python; "compiled" runs a decode step that `torch.compile`
has fused, over a static cache; "graph" replays the same step as one CUDA graph, which leaves next to no launches. What
"generate" takes beyond "graph" is the overhead of launching.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True)
class GenerationTiming:
    """Seconds of every run; the rates and the properties in the singular are of the medians.

    ttfts: time to first token (prefill and the first sampling step).
    ttlts: time to last token.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    ttfts: tuple[float, ...]
    ttlts: tuple[float, ...]

    @property
    def tpots(self) -> tuple[float, ...]:
        """Time per output token after the first."""
        return tuple((last - first) / (self.new_tokens - 1) for first, last in zip(self.ttfts, self.ttlts))

    @property
    def ttft(self) -> float:
        return statistics.median(self.ttfts)

    @property
    def tpot(self) -> float:
        return statistics.median(self.tpots)

    @property
    def ttlt(self) -> float:
        return statistics.median(self.ttlts)

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.batch * self.prompt_tokens / self.ttft

    @property
    def decode_tokens_per_second(self) -> float:
        return self.batch / self.tpot


class Generator(Protocol):
    """Greedy generation of exactly `new_tokens` tokens; end-of-sequence is never chosen.

    `on_token` is called once a token, when its kernels are launched (on a CPU: done). Returns int64 `[B, new_tokens]`.
    """

    def __call__(self, prompt: torch.Tensor, new_tokens: int, on_token: Callable[[], None]) -> torch.Tensor: ...


class PlainGenerator:
    """`model.generate` as it is."""

    def __init__(self, model, prompt: torch.Tensor, new_tokens: int):
        self.model = model

    def __call__(self, prompt: torch.Tensor, new_tokens: int, on_token: Callable[[], None]) -> torch.Tensor:
        class Tell(StoppingCriteria):  # generate calls it once a token
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
                on_token()
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([Tell()]),
        )
        return output[:, prompt.shape[1] :]


class StaticGenerator:
    """Prefill as the model does it, then one decode step again and again over buffers that never move.

    `prepare` turns the step into what is run; it is called once, when all buffers are there. Prompts and numbers of tokens
    are those given here, or fewer tokens. The prefill reads the whole of the static cache, so its time is a little above
    that of plain `generate`.
    """

    @torch.no_grad()
    def __init__(self, model, prompt: torch.Tensor, new_tokens: int, prepare: Callable[[Callable[[], None]], Callable]):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
        if any(layer.is_sliding for layer in self.cache.layers):
            raise ValueError("decoding over a static cache needs full attention: this model has a sliding window")
        self.token = prompt.new_zeros(prompt.shape[0], 1)  # [B, 1]
        self.position = prompt.new_zeros(1)
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        self.ends = prompt.new_tensor(ends)  # never chosen, as `generate` does it below min_new_tokens
        self._prefill(prompt)  # allocates the cache
        self._reset()
        self.run_step = prepare(self._step)
        self.run_step()
        self._reset()

    def _reset(self) -> None:
        self.cache.reset()
        self.position.zero_()

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        output = self.model(
            input_ids=ids,
            position_ids=positions[None],
            cache_position=positions,  # the caches of earlier transformers keep no count of their own
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.token.copy_(output.logits[:, -1].index_fill(-1, self.ends, -torch.inf).argmax(-1, keepdim=True))
        self.position += ids.shape[1]

    def _prefill(self, prompt: torch.Tensor) -> None:
        self._forward(prompt, torch.arange(prompt.shape[1], device=prompt.device))

    def _step(self) -> None:
        self._forward(self.token, self.position)

    @torch.no_grad()
    def __call__(self, prompt: torch.Tensor, new_tokens: int, on_token: Callable[[], None]) -> torch.Tensor:
        self._prefill(prompt)
        on_token()
        tokens = [self.token.clone()]
        for _ in range(new_tokens - 1):
            self.run_step()
            tokens.append(self.token.clone())
            on_token()
        self._reset()
        return torch.cat(tokens, dim=1)


def _compiled(step: Callable[[], None]) -> Callable[[], None]:
    # Past a limit of recompilations (of other models' steps, too) nothing would be compiled any more.
    torch.compiler.reset()
    return torch.compile(step, fullgraph=True, dynamic=False)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph. It is run once before, for whatever kernels load or tune at their first call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _compiled_generator(model, prompt: torch.Tensor, new_tokens: int) -> Generator:
    return StaticGenerator(model, prompt, new_tokens, _compiled)


def _graph_generator(model, prompt: torch.Tensor, new_tokens: int) -> Generator:
    if model.device.type != "cuda":
        raise ValueError(f"decoding 'graph' needs a CUDA device, the model is on {model.device}")
    with torch.cuda.device(model.device):
        return StaticGenerator(model, prompt, new_tokens, _captured)


DECODINGS: dict[str, Callable[..., Generator]] = {
    "generate": PlainGenerator,
    "compiled": _compiled_generator,
    "graph": _graph_generator,
}


def make_generator(decoding: str, model, prompt: torch.Tensor, new_tokens: int) -> Generator:
    """A generator of a way of decoding, ready to run (its cache allocated, its step compiled or captured).

    Args:
        decoding: a key of `DECODINGS`.
        model: a causal LM in eval mode.
        prompt: int64 `[B, S]`, no padding, on the model's device; later prompts have its shape.
        new_tokens: tokens that can be generated at the most.

    Raises:
        ValueError: an unknown decoding, or one that this model or device cannot have.
    """
    if decoding not in DECODINGS:
        raise ValueError(f"unknown decoding {decoding!r}: allowed are {', '.join(DECODINGS)}")
    return DECODINGS[decoding](model, prompt, new_tokens)


class _Clock:
    """Notes when the first and the last token are there. On CUDA it waits for those two alone."""

    def __init__(self, device: torch.device, new_tokens: int):
        self.device, self.new_tokens = device, new_tokens
        self.tokens = 0
        self.start = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self) -> None:
        self.tokens += 1
        if self.tokens == 1:
            self.ttft = self.now() - self.start
        if self.tokens == self.new_tokens:
            self.ttlt = self.now() - self.start


def time_generator(generator: Generator, prompts: list[torch.Tensor], new_tokens: int) -> GenerationTiming:
    """Time one run for each prompt, after one untimed run.

    Args:
        generator: made for prompts of this shape and at least `new_tokens` tokens.
        prompts: int64 `[B, S]` each, on the model's device.
        new_tokens: at least 2.

    Raises:
        ValueError: fewer than two new tokens.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2 to tell prefill from decode, got {new_tokens}")
    clocks = []
    for prompt in (prompts[0], *prompts):
        clocks.append(clock := _Clock(prompt.device, new_tokens))
        generator(prompt, new_tokens, clock)
    batch, length = prompts[0].shape
    ttfts, ttlts = (tuple(getattr(clock, name) for clock in clocks[1:]) for name in ("ttft", "ttlt"))
    return GenerationTiming(batch, length, new_tokens, ttfts, ttlts)


def time_generation(
    model, prompt: torch.Tensor, new_tokens: int, repeats: int = 3, decoding: str = "generate"
) -> GenerationTiming:
    """Time greedy generation of exactly `new_tokens` tokens, after one warm-up.

    Args:
        model: a causal LM in eval mode.
        prompt: int64 `[B, S]`, no padding.
        new_tokens: at least 2; end-of-sequence does not stop the generation.
        repeats: timed runs.
        decoding: "generate", "compiled" or "graph".

    Raises:
        ValueError: fewer than two new tokens, or a decoding that cannot be had here.
    """
    prompt = prompt.to(model.device)
    generator = make_generator(decoding, model, prompt, new_tokens)
    return time_generator(generator, [prompt] * repeats, new_tokens)
