"""The timer of the kernel benchmarks: providers in turns, over more weights than fit into the cache.

It times a list of steps, one per layer, each with separate weights: a benchmark that repeats one layer would find its
weights in the cache and appear faster than memory allows. On a CPU the steps are called. On CUDA they are captured in
a graph, so that launches from Python are not timed; a graph that takes only microseconds contains the steps repeatedly.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from csrc_triton.tools.graph import capture, replay_seconds, warmed_up_stream

Step = Callable[[], object]
Pass = Callable[[], float]  # runs all steps once and returns seconds per step

LEAST_SECONDS = 1e-3  # length of a timed graph: above it, timer resolution and graph launch are below 1 %
WARM_UPS = 3  # before a capture: lazy loading, autotuning, workspaces, autograd's first run


def prepare(steps: Sequence[Step], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Pass:
    """Warm up the steps, and return a function that times one pass over all of them."""
    return _capture(steps) if device.type == "cuda" else _call(steps, clock)


def method(device: torch.device) -> str:
    """Return the timing method of `prepare`, as written in records."""
    return "CUDA graph replay" if device.type == "cuda" else "wall clock"


def in_turns(passes: Mapping[str, Pass], repeats: int, seed: int = 0) -> dict[str, list[float]]:
    """Return seconds per step, `repeats` of each provider.

    Every round times each provider once, in a new random order, so that temporary load on the machine affects all of
    them, and no provider always runs after the same other one.
    """
    order: list[str] = list(passes)
    times: dict[str, list[float]] = {name: [] for name in passes}
    draw = random.Random(seed)
    for _ in range(repeats):
        draw.shuffle(order)
        for name in order:
            times[name].append(passes[name]())
    return times


def _call(steps: Sequence[Step], clock: Callable[[], float]) -> Pass:
    for step in steps:
        step()

    def run() -> float:
        start = clock()
        for step in steps:
            step()
        return (clock() - start) / len(steps)

    return run


def _capture(steps: Sequence[Step]) -> Pass:
    def run(rounds: int = 1) -> None:
        for _ in range(rounds):
            for step in steps:
                step()

    stream = warmed_up_stream(run, WARM_UPS)
    graph, rounds = capture(run, stream), 1
    least = min(replay_seconds(graph) for _ in range(3))
    if least < LEAST_SECONDS:
        rounds = math.ceil(LEAST_SECONDS / least)
        graph = capture(lambda: run(rounds), stream)
    return lambda: replay_seconds(graph) / (rounds * len(steps))


def last_level_cache(device: torch.device) -> int:
    """Return the size in bytes of the last-level cache (L2 on a GPU), or 32 MiB if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def layers_past_the_cache(layer_bytes: int, cache_bytes: int) -> int:
    """Return the number of layers to rotate through: at least four, and more than twice the cache size."""
    return max(4, 2 * cache_bytes // layer_bytes + 1)
