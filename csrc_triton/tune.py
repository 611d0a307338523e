"""Offline tuner: `python -m csrc_triton.tune --hidden 2048 --intermediate 8192 6554` writes `tuned/<gpu>.json`.

For each shape and M bucket it tries every path in question and every valid configuration, refuses what computes a wrong
result, and times the rest by CUDA-graph replay over more weights than the L2 holds. All kernels are compiled beforehand
on all cores, since compiling takes far longer than timing. Nothing here runs while a model runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import triton

from . import launch
from .aot import Compilation
from .glu import plan_glu_mlp
from .launch import DownGemv, DownSplitK, GateUpGemv, GateUpSwap, GateUpTile, GateUpTma, KernelCall, Launch
from .reference import glu_mlp_reference

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}  # max |error| over max |reference|
REPLAYS = 10
HALVES = ("gate_up", "down")


# --- the search, independent of any device ---


def paths(M: int) -> list[str]:
    """The paths in question for `M` tokens: cuBLAS, and those whose tiles are not mostly empty and read no weight thrice."""
    spans = {"gemv": (1, 1), "decode": (2, 16), "small": (17, 256), "prefill": (64, math.inf), "cublas": (1, math.inf)}
    return [path for path in launch.PATHS if spans[path][0] <= M <= spans[path][1]]


def variants(half: str, path: str, M: int, H: int, IP: int, dtype: torch.dtype, sm: int) -> list:
    """The valid configurations of one half ("gate_up" or "down") of a path; none where cuBLAS does it."""
    pdl = (False, True) if sm >= 90 else (False,)
    rows = (64 // dtype.itemsize, 128 // dtype.itemsize, 256 // dtype.itemsize)  # 64, 128 and 256 bytes of K
    block_m = (launch.token_block(path, M),)
    grid = {
        ("gate_up", "gemv"): {GateUpGemv: ((1, 2, 4), (2, 4, 8), pdl)},
        ("down", "gemv"): {DownGemv: ((1, 2, 4), (512, 1024, 2048), (4, 8), pdl)},
        ("gate_up", "decode"): {GateUpSwap: (block_m, (16, 32, 64), rows[1:], (4, 8), (3, 4), pdl)},
        ("down", "decode"): {DownSplitK: (block_m, (32, 64), rows[1:], (2, 4, 8), (4,), (4,), pdl)},
        ("gate_up", "prefill"): {
            GateUpTma: ((64, 128), (64, 128), rows[1:2], (4, 8), (3, 4)),
            GateUpTile: ((64, 128), (64, 128), rows[:2], (4, 8), (3, 4)),
        },
    }.get((half, "decode" if path == "small" else path), {})
    configs = [kind(*values) for kind, choices in grid.items() for values in itertools.product(*choices)]
    return [config for config in configs if launch.is_valid(config, sm, M, H, IP, dtype)]


@dataclass
class Search:
    """Outcome of one search: microseconds of what was timed, and what was refused, in the order tried."""

    timed: dict[Launch, float] = field(default_factory=dict)
    refused: list[Launch] = field(default_factory=list)

    @property
    def best(self) -> tuple[Launch, float] | None:
        """The fastest launch; the first tried among equals. None if everything was refused."""
        return min(self.timed.items(), key=lambda item: item[1], default=None)


def search(
    M: int,
    H: int,
    IP: int,
    dtype: torch.dtype,
    sm: int,
    check: Callable[[Launch], bool],
    time: Callable[[Launch], float],
    halves: Sequence[str] = HALVES,
) -> Search:
    """Per path: the gate_up variants beside the heuristic's down, then the down variants beside the best gate_up.

    Of the halves that are not in `halves` the heuristic's configurations alone are tried.
    `check` tells whether a launch computes the right result, `time` its microseconds; only what passes is timed.
    """
    result = Search()

    def measure(decision: Launch) -> float:
        if decision in result.refused:
            return math.inf
        if decision not in result.timed:
            if not check(decision):
                result.refused.append(decision)
                return math.inf
            result.timed[decision] = time(decision)
        return result.timed[decision]

    for path in paths(M):
        best = launch.heuristic(path, M, H, IP, dtype, sm)
        measure(best)
        for half in halves:
            configs = variants(half, path, M, H, IP, dtype, sm)
            best = min([best, *(dataclasses.replace(best, **{half: config}) for config in configs)], key=measure)
    return result


def launches(M: int, H: int, IP: int, dtype: torch.dtype, sm: int, halves: Sequence[str] = HALVES) -> Iterator[Launch]:
    """Launches that together hold every configuration that `search` may try."""
    for path in paths(M):
        start = launch.heuristic(path, M, H, IP, dtype, sm)
        yield start
        for half in halves:
            for config in variants(half, path, M, H, IP, dtype, sm):
                yield dataclasses.replace(start, **{half: config})


# --- compiling ---


class Point(NamedTuple):
    """One launch of one shape: M tokens, hidden size H, I neurons."""

    M: int
    H: int
    I: int
    dtype: torch.dtype
    sm: int
    decision: Launch

    def compilations(self) -> list[Compilation]:
        """What its kernels compile to, planned on meta tensors: no device, no memory."""
        IP = triton.cdiv(self.I, launch.PAD) * launch.PAD
        x, gate_up, down = (
            torch.empty(shape, dtype=self.dtype, device="meta")
            for shape in ((self.M, self.H), (2, IP, self.H), (self.H, IP))
        )
        plan = plan_glu_mlp(x, gate_up, down, self.I, "silu", None, None, None, self.decision, self.sm)
        return [Compilation.of(call, self.sm) for call in plan.calls if isinstance(call, KernelCall)]

    def compile(self) -> int:
        """Put its kernels into Triton's cache on the disk. Returns how many do not compile; the search refuses those."""
        failed = 0
        for compilation in self.compilations():
            try:
                triton.compile(compilation.source, target=compilation.target, options=compilation.options.__dict__)
            except Exception:  # noqa: BLE001 - a compiler raises anything
                failed += 1
        return failed


def distinct(points: Iterable[Point]) -> list[Point]:
    """One point of those that launch the same kernels: no kernel is specialised on M, nor on I beyond its padding."""
    return list({(point.H, point.dtype, point.sm, point.decision): point for point in points}.values())


def precompile(points: list[Point], workers: int) -> None:
    """Compile the kernels of all points in `workers` processes, with progress on stderr."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit a CUDA context that it cannot use
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        failed = 0
        for done, failures in enumerate(pool.map(Point.compile, points, chunksize=4), 1):
            failed += failures
            print(f"\rcompiled {done} of {len(points)}, {failed} refused", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


# --- the device ---


class Bench:
    """Weights of enough layers to exceed the L2 threefold, and at least four, for one shape on one device.

    The CPU serves Triton's interpreter: everything runs, and its times mean nothing.
    """

    def __init__(self, M: int, H: int, I: int, dtype: torch.dtype, device: torch.device):
        IP = triton.cdiv(I, launch.PAD) * launch.PAD
        layer_bytes = 3 * H * IP * dtype.itemsize
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        layers = max(4, triton.cdiv(3 * cache, layer_bytes))
        generator = torch.Generator(device).manual_seed(0)

        def weights(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(H**-0.5).to(dtype)

        self.I = I
        self.sm = launch.compute_capability(device)
        self.x = weights(M, H) * H**0.5
        self.layers = []
        for _ in range(layers):
            gate_up, down = weights(2, IP, H), weights(H, IP)
            gate_up[:, I:], down[:, I:] = 0, 0
            self.layers.append((gate_up, down))
        self.reference = glu_mlp_reference(self.x.float(), *(w.float() for w in self.layers[0]), I)

    def plan(self, layer: int, decision: Launch) -> launch.Plan:
        return plan_glu_mlp(self.x, *self.layers[layer], self.I, "silu", None, None, None, decision, self.sm)

    def check(self, decision: Launch) -> bool:
        """Whether the result is within `TOLERANCE`. What does not compile or fit is refused, a failed device is not."""
        try:
            y = self.plan(0, decision).run()
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except (triton.TritonError, RuntimeError):
            return False
        error = (y.float() - self.reference).abs().max() / self.reference.abs().max()
        return bool(error < TOLERANCE[self.x.dtype])

    def time(self, decision: Launch) -> float:
        """Median microseconds of one MLP: a graph runs layer after layer, so that none finds its weights in the L2."""
        plans = [self.plan(layer, decision) for layer in range(len(self.layers))]
        if self.x.device.type == "cpu":
            start = perf_counter()
            for plan in plans:
                plan.run()
            return (perf_counter() - start) * 1e6 / len(plans)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile and let cuBLAS take its workspace before the capture
            for plan in plans:
                plan.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for plan in plans:
                plan.run()
        graph.replay()
        milliseconds = []
        for _ in range(REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
        return statistics.median(milliseconds) * 1000 / len(plans)


# --- the table ---


def write_table(path: Path, gpu: str, entries: dict[launch.TableKey, tuple[Launch, float]]) -> None:
    """Put `entries` into the table at `path`, beside those of other shapes that it has; all or nothing."""
    kept = []
    if path.exists():
        rows = json.loads(path.read_text())["entries"]
        kept = [row for row in rows if launch.entry_from_dict(row)[0] not in entries]
    measured = [
        {**launch.entry_to_dict(key, decision), "microseconds": round(time, 3)}
        for key, (decision, time) in entries.items()
    ]
    content = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "entries": kept + measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m csrc_triton.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", required=True, metavar="H")
    parser.add_argument("--intermediate", type=int, nargs="+", required=True, metavar="I")
    parser.add_argument("--tokens", type=int, nargs="+", default=launch.M_BUCKETS, choices=launch.M_BUCKETS)
    parser.add_argument("--dtype", default="bfloat16", choices=list(launch.DTYPES))
    parser.add_argument("--out", type=Path, help="default: the package's table of this GPU")
    parser.add_argument(
        "--paths-only",
        action="store_true",
        help="choose the path alone, with the heuristics' configurations: takes seconds",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a rehearsal in Triton's interpreter, needs --out",
    )
    options = parser.parse_args(argv)
    interpreted = options.device == "cpu"
    if interpreted and not (triton.knobs.runtime.interpret and options.out):
        print("error: --device cpu needs TRITON_INTERPRET=1 and --out", file=sys.stderr)
        return 2
    if not interpreted and not torch.cuda.is_available():
        print("error: tuning needs a CUDA device, and none is available", file=sys.stderr)
        return 2
    if min(options.hidden + options.intermediate) < 1:
        print("error: --hidden and --intermediate must be at least 1", file=sys.stderr)
        return 2
    device = torch.device("cpu") if interpreted else torch.device("cuda", torch.cuda.current_device())
    dtype = launch.DTYPES[options.dtype]
    gpu = "Triton's interpreter" if interpreted else torch.cuda.get_device_name(device)
    path = options.out or launch.table_path(gpu)
    if path.exists():
        try:
            launch.load_table(path)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    sm = launch.compute_capability(device)
    halves = () if options.paths_only else HALVES
    grid = itertools.product(options.hidden, options.intermediate, options.tokens)
    # Of widths that are padded to the same one the first: they launch the same kernels.
    first: dict[tuple[int, int, int], int] = {}
    for H, I, M in grid:
        first.setdefault((H, triton.cdiv(I, launch.PAD) * launch.PAD, M), I)
    shapes = [(H, I, IP, M) for (H, IP, M), I in first.items()]
    points = (Point(M, H, I, dtype, sm, d) for H, I, IP, M in shapes for d in launches(M, H, IP, dtype, sm, halves))
    if not interpreted:
        precompile(distinct(points), os.cpu_count() or 1)
    for H, I, IP, M in shapes:
        bench = Bench(M, H, I, dtype, device)
        found = search(M, H, IP, dtype, bench.sm, bench.check, bench.time, halves)
        if found.best is None:
            print(f"H {H}, I {I}, M {M}: no configuration computes the right result", file=sys.stderr)
            continue
        decision, time = found.best
        counts = f"{len(found.timed)} timed, {len(found.refused)} refused"
        print(f"H {H}, I {I}, M {M}: {time:.1f} us, {decision} ({counts})", flush=True)
        write_table(path, gpu, {(bench.sm, H, IP, M, dtype): (decision, time)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
