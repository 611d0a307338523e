"""Timing of generation at a forced length.

Prefill and decode are timed separately, so that longer output never looks like slower tokens. The decoding methods
(`DECODINGS`) return the same greedy tokens and differ in what a token costs in addition to its arithmetic. Three are
what users call: "generate" launches every kernel from Python; "static" is `generate` over a static cache, whose decode
step transformers compiles on a GPU; "graph_decoding" is `generate` within `gluprune.graph_decoding`. Two run only the
decode step, over a static cache, and show what the others can reach: "compiled" compiles it, "graph" replays it as one
CUDA graph. The time of "generate" beyond "graph" is launch overhead.
"""

from __future__ import annotations

import inspect
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList

from gluprune.runtime.graphs import CACHE_NAMES, graph_decoding


@dataclass(frozen=True)
class GenerationTiming:
    """Seconds of every run; rates and properties in the singular are computed from the medians.

    Attributes:
        batch: Prompts per batch.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens generated for each prompt.
        ttfts: Times to first token (prefill and the first sampling step).
        ttlts: Times to last token.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    ttfts: tuple[float, ...]
    ttlts: tuple[float, ...]

    @property
    def tpots(self) -> tuple[float, ...]:
        """Times per output token after the first."""
        return tuple((last - first) / (self.new_tokens - 1) for first, last in zip(self.ttfts, self.ttlts, strict=True))

    @property
    def ttft(self) -> float:
        """Median time to first token."""
        return statistics.median(self.ttfts)

    @property
    def tpot(self) -> float:
        """Median time per output token."""
        return statistics.median(self.tpots)

    @property
    def ttlt(self) -> float:
        """Median time to last token."""
        return statistics.median(self.ttlts)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens over the median time to first token."""
        return self.batch * self.prompt_tokens / self.ttft

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens of all prompts over the median time per output token."""
        return self.batch / self.tpot


class Generator(Protocol):
    """Greedy generation of exactly `new_tokens` tokens; end-of-sequence is never chosen."""

    def __call__(self, prompt: torch.Tensor, new_tokens: int, on_token: Callable[[], None]) -> torch.Tensor:
        """Generate.

        Args:
            prompt: int64 `[B, S]`.
            new_tokens: Tokens for each prompt.
            on_token: Called for each token when its kernels are launched (on a CPU: done).

        Returns:
            int64 `[B, new_tokens]`.
        """
        ...


class PlainGenerator:
    """Plain `model.generate`, with further options of it."""

    def __init__(self, model, prompt: torch.Tensor, new_tokens: int, **options: Any):
        self.model = model
        self.options = options

    def __call__(self, prompt: torch.Tensor, new_tokens: int, on_token: Callable[[], None]) -> torch.Tensor:
        """See `Generator`."""

        class Notify(StoppingCriteria):  # generate calls it for each token
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
                on_token()
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([Notify()]),
            **self.options,
        )
        return output[:, prompt.shape[1] :]


class StaticGenerator:
    """The model's own prefill, then one repeated decode step on buffers that never move.

    The prefill reads the whole static cache, so it takes slightly longer than that of plain `generate`.

    Args:
        model: A causal LM in eval mode.
        prompt: int64 `[B, S]`; later prompts have its shape.
        new_tokens: Maximum number of tokens that can be generated.
        prepare: Compiles or captures the decode step; called once, when all buffers are allocated.
    """

    @torch.no_grad()
    def __init__(self, model, prompt: torch.Tensor, new_tokens: int, prepare: Callable[[Callable[[], None]], Callable]):
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = next(name for name in CACHE_NAMES if name in parameters)
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
        layers: Any = self.cache.layers
        if any(layer.is_sliding for layer in layers):
            raise ValueError("decoding over a static cache needs full attention, but this model has a sliding window")
        self.token = prompt.new_zeros(prompt.shape[0], 1)  # [B, 1]
        self.position = prompt.new_zeros(1)
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        self.ends = prompt.new_tensor(ends)  # never chosen, as in `generate` below min_new_tokens
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
            cache_position=positions,  # the caches of earlier transformers do not count their tokens
            **{self._cache_name: self.cache},
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
        """See `Generator`."""
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
    # torch.compile stops compiling after a number of recompilations, which counts the steps of other models as well.
    torch.compiler.reset()
    return torch.compile(step, fullgraph=True, dynamic=False)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Capture the step as a CUDA graph, after one run in which kernels load and tune."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # its default is a stream of the device that captured first
        step()
    return graph.replay


def _static_generator(model, prompt: torch.Tensor, new_tokens: int) -> Generator:
    return PlainGenerator(model, prompt, new_tokens, cache_implementation="static")


def _graph_decoding_generator(model, prompt: torch.Tensor, new_tokens: int) -> Generator:
    _check_cuda("graph_decoding", model)
    generator = PlainGenerator(model, prompt, new_tokens)
    weakref.finalize(generator, graph_decoding(model).close)
    return generator


def _check_cuda(decoding: str, model) -> None:
    if model.device.type != "cuda":
        raise ValueError(f"decoding {decoding!r} needs a CUDA device, the model is on {model.device}")


def _compiled_generator(model, prompt: torch.Tensor, new_tokens: int) -> Generator:
    return StaticGenerator(model, prompt, new_tokens, _compiled)


def _graph_generator(model, prompt: torch.Tensor, new_tokens: int) -> Generator:
    _check_cuda("graph", model)
    with torch.cuda.device(model.device):
        return StaticGenerator(model, prompt, new_tokens, _captured)


DECODINGS: dict[str, Callable[..., Generator]] = {
    "generate": PlainGenerator,
    "static": _static_generator,
    "graph_decoding": _graph_decoding_generator,
    "compiled": _compiled_generator,
    "graph": _graph_generator,
}


def make_generator(decoding: str, model, prompt: torch.Tensor, new_tokens: int) -> Generator:
    """Return a generator that is ready to run: its cache is allocated, its step compiled or captured.

    Args:
        decoding: A key of `DECODINGS`.
        model: A causal LM in eval mode.
        prompt: int64 `[B, S]`, no padding, on the model's device; later prompts have its shape.
        new_tokens: Maximum number of tokens that can be generated.

    Raises:
        ValueError: The decoding is unknown, or this model or device does not support it.
    """
    if decoding not in DECODINGS:
        raise ValueError(f"unknown decoding {decoding!r}; allowed: {', '.join(DECODINGS)}")
    return DECODINGS[decoding](model, prompt, new_tokens)


class _Clock:
    """Records when the first and the last token are done. On CUDA it waits for these two only."""

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
        generator: For prompts of this shape and at least `new_tokens` tokens.
        prompts: int64 `[B, S]` each, on the model's device.
        new_tokens: At least 2.

    Raises:
        ValueError: Fewer than two new tokens.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2 to separate prefill from decode, got {new_tokens}")
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
        model: A causal LM in eval mode.
        prompt: int64 `[B, S]`, no padding.
        new_tokens: At least 2; end-of-sequence does not stop the generation.
        repeats: Timed runs.
        decoding: A key of `DECODINGS`.

    Raises:
        ValueError: Fewer than two new tokens, or a decoding that model or device does not support.
    """
    prompt = prompt.to(model.device)
    generator = make_generator(decoding, model, prompt, new_tokens)
    return time_generator(generator, [prompt] * repeats, new_tokens)
