"""The ceilings of the machine, a copy and a large matrix product, measured in the same run as the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.lib import timing
from benchmarks.lib.shapes import ShapeSet
from gluprune.measure.records import Record

REPEATS = 20


@dataclass(frozen=True)
class Ceilings:
    """Bytes and floating-point operations per second."""

    bandwidth: float
    rate: float

    def floor(self, nbytes: int, flops: int) -> float:
        """Return the minimum time in seconds to move `nbytes` and compute `flops`."""
        return max(nbytes / self.bandwidth, flops / self.rate)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.is_cuda:  # a captured `copy_` runs on the copy engine: 2.8 TB/s on an H200, a kernel reaches 4.3
        torch.neg(source, out=target)
    else:
        target.copy_(source)


def measure(device: torch.device, shapes: ShapeSet, keep: Callable[[Record], None]) -> Ceilings:
    """Measure both, keep their records, and return the ceilings computed from the medians."""
    dtype, nbytes, n = shapes.dtype, shapes.copied_bytes, shapes.gemm_size
    source = torch.randn(nbytes // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    passes = {
        "copy": timing.prepare([partial(_copy, source, target)], device),
        "gemm": timing.prepare([lambda: torch.mm(a, b.t(), out=out)], device),
    }
    times = timing.in_turns(passes, REPEATS)
    how = {"method": timing.method(device)}
    copy = Record.of(
        "ceiling: copy", "torch", {"bytes": nbytes}, dtype, unit="s", values=times["copy"], nbytes=2 * nbytes, **how
    )
    gemm = Record.of("ceiling: gemm", "torch", {"n": n}, dtype, unit="s", values=times["gemm"], flops=2 * n**3, **how)
    keep(copy)
    keep(gemm)
    return Ceilings(copy.nbytes / copy.p50, gemm.flops / gemm.p50)
