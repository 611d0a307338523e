"""What the machine can do at the most, measured in the same run as everything else: a copy and a large matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import timing
from benchmarks.shapes import ShapeSet
from gluprune.records import Record

REPEATS = 20


@dataclass(frozen=True)
class Ceilings:
    """Bytes and floating-point operations a second."""

    bandwidth: float
    rate: float

    def floor(self, nbytes: int, flops: int) -> float:
        """The least seconds that moving `nbytes` and doing `flops` take."""
        return max(nbytes / self.bandwidth, flops / self.rate)


def measure(device: torch.device, shapes: ShapeSet, keep: Callable[[Record], None]) -> Ceilings:
    """Measure both, keep their records, and return what the medians say."""
    dtype, nbytes, n = shapes.dtype, shapes.copied_bytes, shapes.gemm_size
    source = torch.zeros(nbytes // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    passes = {
        "copy": timing.prepare([lambda: target.copy_(source)], device),
        "gemm": timing.prepare([lambda: torch.mm(a, b.t(), out=out)], device),
    }
    times = timing.in_turns(passes, REPEATS)
    how = {"method": timing.method(device)}
    copy = Record.of("ceiling: copy", "torch", {"bytes": nbytes}, dtype, "s", times["copy"], nbytes=2 * nbytes, **how)
    gemm = Record.of("ceiling: gemm", "torch", {"n": n}, dtype, "s", times["gemm"], flops=2 * n**3, **how)
    keep(copy)
    keep(gemm)
    return Ceilings(copy.nbytes / copy.p50, gemm.flops / gemm.p50)
