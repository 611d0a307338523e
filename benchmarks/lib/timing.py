"""The timer of the kernel benchmarks: providers in turns, over more weights than a cache holds.

What is timed is a list of steps, one a layer, each with weights of its own: a benchmark that repeats one layer finds its
weights in the cache and beats the memory. On a CPU the steps are called; on CUDA they are captured in a graph, so that no
launch from Python is timed, and a graph that is over in microseconds holds its steps several times.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Step = Callable[[], object]
Pass = Callable[[], float]  # runs all steps once, tells seconds a step

LEAST_SECONDS = 1e-3  # of one timed graph: above it the resolution and the launch of the graph are below 1 %
WARM_UPS = 3  # before a capture: lazy loading, autotuning, workspaces, autograd's first run


def prepare(steps: Sequence[Step], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Pass:
    """Run the steps to warm them up, and return what times one pass over all of them."""
    return _capture(steps) if device.type == "cuda" else _call(steps, clock)


def method(device: torch.device) -> str:
    """How `prepare` times, as records tell it."""
    return "CUDA graph replay" if device.type == "cuda" else "wall clock"


def in_turns(passes: Mapping[str, Pass], repeats: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds a step, `repeats` of each provider.

    Every round times everybody once, in an order drawn anew: a busy moment of the machine meets all of them, and nobody
    always runs behind the same neighbour.
    """
    order, times = list(passes), {name: [] for name in passes}
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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    def graph_of(rounds: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for step in steps:
                    step()
        graph.replay()
        return graph

    def seconds(graph: torch.cuda.CUDAGraph) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    graph, rounds = graph_of(1), 1
    least = min(seconds(graph) for _ in range(3))
    if least < LEAST_SECONDS:
        rounds = math.ceil(LEAST_SECONDS / least)
        graph = graph_of(rounds)
    return lambda: seconds(graph) / (rounds * len(steps))


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache: the L2 of a GPU, the L3 (or what is last) of a CPU; 32 MiB where it is not told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def layers_past_the_cache(layer_bytes: int, cache_bytes: int) -> int:
    """Layers to rotate: at least four, and more than twice the cache."""
    return max(4, 2 * cache_bytes // layer_bytes + 1)
