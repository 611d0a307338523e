"""CUDA graphs, to time work without its launches from Python."""

from __future__ import annotations

from collections.abc import Callable

import torch


def warmed_up_stream(run: Callable[[], object], times: int = 1) -> torch.cuda.Stream:
    """Run on a new stream and return it, so that a capture there finds kernels compiled and workspaces allocated."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return stream


def capture(run: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Capture what `run` launches on `stream`, replay it once, and return the graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    graph.replay()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Return the seconds that one replay of a graph takes on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
