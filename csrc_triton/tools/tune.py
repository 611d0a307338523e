"""Offline tuner: `python -m csrc_triton.tools.tune --hidden 2048 --intermediate 8192 6554` writes `tuned/<gpu>.json`.

For each shape and M bucket it tries every candidate path and every valid configuration, rejects launches with a wrong
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
from triton import knobs

from csrc_triton.glu.down_decode import DownGemv, DownSplitK
from csrc_triton.glu.forward import meta_weights, plan
from csrc_triton.glu.gate_up_decode import GateUpGemv, GateUpSwap
from csrc_triton.glu.gate_up_prefill import GateUpTile, GateUpTma
from csrc_triton.glu.reference import glu_mlp_reference
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch import tables
from csrc_triton.launch.call import KernelCall, Plan
from csrc_triton.launch.chooser import heuristic, token_block
from csrc_triton.launch.configs import Config, Launch, Problem
from csrc_triton.launch.device import compute_capability
from csrc_triton.launch.paths import PATHS
from csrc_triton.layout import DTYPES, cdiv, padded_width
from csrc_triton.tools.aot.compile import Compilation
from csrc_triton.tools.graph import capture, replay_seconds, warmed_up_stream

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}  # max |error| over max |reference|
REPLAYS = 10
HALVES = ("gate_up", "down")


# The search, which needs no device.


def paths(M: int) -> list[str]:
    """Return the candidate paths for `M` tokens: cuBLAS, and those whose tiles are mostly full."""
    spans = {"gemv": (1, 1), "decode": (2, 16), "small": (17, 256), "prefill": (64, math.inf), "cublas": (1, math.inf)}
    return [path for path in PATHS if spans[path][0] <= M <= spans[path][1]]


def variants(half: str, path: str, problem: Problem) -> list[Config]:
    """Return the valid configurations of one half ("gate_up" or "down") of a path; none where cuBLAS runs it."""
    itemsize = problem.dtype.itemsize
    pdl = (False, True) if problem.sm >= 90 else (False,)
    rows = (64 // itemsize, 128 // itemsize, 256 // itemsize)  # 64, 128 and 256 bytes of K
    tokens = (token_block(path, problem.M),)
    swap = dict(block_m=tokens, block_n=(16, 32, 64), block_k=rows[1:], num_warps=(4, 8), num_stages=(3, 4), pdl=pdl)
    split = dict(
        block_m=tokens,
        block_n=(32, 64),
        block_k=rows[1:],
        split_k=(2, 4, 8),
        num_warps=(4,),
        num_stages=(4,),
        pdl=pdl,
    )
    tile = dict(block_m=(64, 128), block_n=(64, 128), num_warps=(4, 8), num_stages=(3, 4))
    grid: dict[type[Config], dict[str, tuple]] = {
        ("gate_up", "gemv"): {GateUpGemv: dict(block_n=(1, 2, 4), num_warps=(2, 4, 8), pdl=pdl)},
        ("down", "gemv"): {
            DownGemv: dict(block_n=(1, 2, 4), block_k=(512, 1024, 2048), num_warps=(4, 8), pdl=pdl),
        },
        ("gate_up", "decode"): {GateUpSwap: swap},
        ("down", "decode"): {DownSplitK: split},
        ("gate_up", "prefill"): {
            GateUpTma: tile | dict(block_k=rows[1:2]),
            GateUpTile: tile | dict(block_k=rows[:2]),
        },
    }.get((half, "decode" if path == "small" else path), {})
    configs = [
        kind(**dict(zip(choices, values, strict=True)))
        for kind, choices in grid.items()
        for values in itertools.product(*choices.values())
    ]
    return [config for config in configs if config.valid(problem)]


@dataclass
class Search:
    """Outcome of one search, in the order tried: the microseconds of timed launches, and the rejected launches."""

    timed: dict[Launch, float] = field(default_factory=dict)
    rejected: list[Launch] = field(default_factory=list)

    @property
    def best(self) -> tuple[Launch, float] | None:
        """The fastest launch; among equals, the first tried. None if everything was rejected."""
        return min(self.timed.items(), key=lambda item: item[1], default=None)


def search(
    problem: Problem,
    *,
    check: Callable[[Launch], bool],
    time: Callable[[Launch], float],
    halves: Sequence[str] = HALVES,
) -> Search:
    """Search per path: the gate_up variants with the heuristic's down, then the down variants with the best gate_up.

    Args:
        problem: what to tune for.
        check: returns whether a launch computes the right result.
        time: returns the microseconds of a launch; called only for launches that pass the check.
        halves: the halves to vary; for others only the heuristic's configurations are tried.
    """
    result = Search()

    def measure(launch: Launch) -> float:
        if launch in result.rejected:
            return math.inf
        if launch not in result.timed:
            if not check(launch):
                result.rejected.append(launch)
                return math.inf
            result.timed[launch] = time(launch)
        return result.timed[launch]

    for path in paths(problem.M):
        best = heuristic(path, problem)
        measure(best)
        for half in halves:
            configs = variants(half, path, problem)
            best = min([best, *(dataclasses.replace(best, **{half: config}) for config in configs)], key=measure)
    return result


def launches(problem: Problem, halves: Sequence[str] = HALVES) -> Iterator[Launch]:
    """Yield launches that together hold every configuration that `search` may try."""
    for path in paths(problem.M):
        start = heuristic(path, problem)
        yield start
        for half in halves:
            for config in variants(half, path, problem):
                yield dataclasses.replace(start, **{half: config})


# Compiling ahead.


class Point(NamedTuple):
    """One launch of one problem of I neurons."""

    problem: Problem
    I: int
    launch: Launch

    def compilations(self) -> list[Compilation]:
        """Return the compilations of its kernels, planned on meta tensors: no device, no memory."""
        M, H, _, dtype, sm, _ = self.problem
        x = torch.empty((M, H), dtype=dtype, device="meta")
        calls = plan(x, meta_weights(H, self.I, dtype), self.launch, self.problem).calls
        return [Compilation.of(call, sm) for call in calls if isinstance(call, KernelCall)]

    def compile(self) -> int:
        """Put its kernels into Triton's cache on disk. Return how many do not compile; the search rejects those."""
        failed = 0
        for compilation in self.compilations():
            try:
                triton.compile(compilation.source, target=compilation.target, options=compilation.options.__dict__)
            except Exception:  # a compiler may raise any error
                failed += 1
        return failed


def distinct(points: Iterable[Point]) -> list[Point]:
    """Return one point of those that launch the same kernels: kernels are not specialised on M or on I itself."""
    return list({(p.problem.H, p.problem.dtype, p.problem.sm, p.launch): p for p in points}.values())


def precompile(points: list[Point], workers: int) -> None:
    """Compile the kernels of all points in `workers` processes, with progress on stderr."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit a CUDA context that it cannot use
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        failed = 0
        for done, failures in enumerate(pool.map(Point.compile, points, chunksize=4), 1):
            failed += failures
            print(f"\rcompiled {done} of {len(points)}, {failed} rejected", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


# Measuring.


class Bench:
    """Weights of at least four layers, more than three times the L2, for one shape on one device.

    The CPU is for Triton's interpreter: everything runs, but the times mean nothing.
    """

    def __init__(self, problem: Problem, I: int, device: torch.device):
        M, H, IP, dtype, *_ = self.problem = problem
        layer_bytes = 3 * H * IP * dtype.itemsize
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(H**-0.5).to(dtype)

        self.x = random(M, H) * H**0.5
        self.layers = []
        for _ in range(max(4, cdiv(3 * cache, layer_bytes))):
            gate_up, down = random(2, IP, H), random(H, IP)
            gate_up[:, I:], down[:, I:] = 0, 0
            self.layers.append(GluWeights(gate_up, down, I))
        first = self.layers[0]
        exact = GluWeights(first.gate_up.float(), first.down.float(), I)
        self.reference = glu_mlp_reference(self.x.float(), exact)

    def plan(self, layer: int, launch: Launch) -> Plan:
        """Return the plan of one layer."""
        return plan(self.x, self.layers[layer], launch, self.problem)

    def check(self, launch: Launch) -> bool:
        """Return whether the launch compiles, fits, and computes within `TOLERANCE`. A lost device raises."""
        try:
            y = self.plan(0, launch).run()
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except (triton.TritonError, RuntimeError):
            return False
        error = (y.float() - self.reference).abs().max() / self.reference.abs().max()
        return bool(error < TOLERANCE[self.x.dtype])

    def time(self, launch: Launch) -> float:
        """Return the median microseconds of one MLP, from a graph of all layers: none finds its weights in the L2."""
        plans = [self.plan(layer, launch) for layer in range(len(self.layers))]

        def run() -> None:
            for each in plans:
                each.run()

        if self.x.device.type == "cpu":
            start = perf_counter()
            run()
            return (perf_counter() - start) * 1e6 / len(plans)
        graph = capture(run, warmed_up_stream(run))
        return statistics.median(replay_seconds(graph) for _ in range(REPLAYS)) * 1e6 / len(plans)


# The table and the command.


def write_table(path: Path, gpu: str, entries: dict[Problem, tuple[Launch, float]]) -> None:
    """Write `entries` into the table at `path` and keep its entries of other shapes; all or nothing."""
    kept = []
    if path.exists():
        rows = json.loads(path.read_text())["entries"]
        kept = [row for row in rows if tables.entry_from_dict(row)[0] not in entries]
    measured = [
        {**tables.entry_to_dict(problem, launch), "microseconds": round(time, 3)}
        for problem, (launch, time) in entries.items()
    ]
    content = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "entries": kept + measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").split("\n\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m csrc_triton.tools.tune", description=description)
    parser.add_argument("--hidden", type=int, nargs="+", required=True, metavar="H")
    parser.add_argument("--intermediate", type=int, nargs="+", required=True, metavar="I")
    parser.add_argument("--tokens", type=int, nargs="+", default=tables.M_BUCKETS, choices=tables.M_BUCKETS)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="default: the package's table of this GPU")
    parser.add_argument("--missing", action="store_true", help="only shapes that the table does not have yet")
    parser.add_argument(
        "--paths-only",
        action="store_true",
        help="choose only the path, with the heuristics' configurations: takes seconds",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a dry run in Triton's interpreter; needs --out",
    )
    return parser


def _obstacle(options: argparse.Namespace) -> str | None:
    """Return why the command cannot run with these options; None if it can."""
    if options.device == "cpu" and not (knobs.runtime.interpret and options.out):
        return "--device cpu needs TRITON_INTERPRET=1 and --out"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "tuning needs a CUDA device, and none is available"
    if min(options.hidden + options.intermediate) < 1:
        return "--hidden and --intermediate must be at least 1"
    return None


def _shapes(options: argparse.Namespace, sm: int) -> dict[Problem, int]:
    """Return the problems to tune and a width of each; widths with the same padding are one problem."""
    first: dict[Problem, int] = {}
    for H, I, M in itertools.product(options.hidden, options.intermediate, options.tokens):
        first.setdefault(Problem(M, H, padded_width(I), DTYPES[options.dtype], sm), I)
    return first


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(argv)
    interpreted = options.device == "cpu"
    if reason := _obstacle(options):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cpu") if interpreted else torch.device("cuda", torch.cuda.current_device())
    gpu = "Triton's interpreter" if interpreted else torch.cuda.get_device_name(device)
    path = options.out or tables.table_path(gpu)
    known: tables.Table = {}
    if path.exists():
        try:
            known = tables.load_table(path)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    halves = () if options.paths_only else HALVES
    shapes = _shapes(options, compute_capability(device))
    if options.missing:
        shapes = {problem: I for problem, I in shapes.items() if problem not in known}
    if not interpreted:
        points = (Point(problem, I, launch) for problem, I in shapes.items() for launch in launches(problem, halves))
        precompile(distinct(points), os.cpu_count() or 1)
    for problem, I in shapes.items():
        bench = Bench(problem, I, device)
        found = search(problem, check=bench.check, time=bench.time, halves=halves)
        label = f"H {problem.H}, I {I}, M {problem.M}"
        if found.best is None:
            print(f"{label}: no configuration computes the right result", file=sys.stderr)
            continue
        launch, time = found.best
        counts = f"{len(found.timed)} timed, {len(found.rejected)} rejected"
        print(f"{label}: {time:.1f} us, {launch} ({counts})", flush=True)
        write_table(path, gpu, {problem: (launch, time)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
