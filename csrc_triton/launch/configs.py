"""Launch configurations: one class per kernel, which knows when it is valid and how it is launched.

The classes are next to their kernels in `csrc_triton.glu`; `csrc_triton.launch.chooser` chooses among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from triton import knobs

from csrc_triton.launch.call import Plan
from csrc_triton.launch.device import shared_memory_limit
from csrc_triton.layout import FP8, PAD

if TYPE_CHECKING:
    from csrc_triton.glu.weights import GluWeights


class Problem(NamedTuple):
    """The problem that a launch is chosen for: a GLU MLP of hidden size H and padded intermediate size on M tokens.

    `dtype` is that of the tokens, and of the weights unless those are `fp8`. `sm` is the compute capability times ten.
    """

    M: int
    H: int
    I_padded: int
    dtype: torch.dtype
    sm: int
    fp8: bool = False

    @property
    def weight_itemsize(self) -> int:
        """Return the bytes of a weight."""
        return FP8.itemsize if self.fp8 else self.dtype.itemsize


class Config(ABC):
    """Block sizes and launch options of one kernel. The class determines the kernel.

    Subclasses are frozen dataclasses with keyword-only fields.
    """

    num_warps: int

    def shared_memory(self, problem: Problem) -> int:
        """Return the bytes of shared memory that a program takes."""
        return 0

    def valid(self, problem: Problem) -> bool:
        """Return whether the kernel computes the right result for `problem` and fits on the chip."""
        fields = vars(self)
        sizes = [value for name, value in fields.items() if name.startswith("block_") or name == "num_warps"]
        if not all(value >= 1 and value & (value - 1) == 0 for value in sizes) or fields.get("num_stages", 1) < 1:
            return False
        if self.shared_memory(problem) > shared_memory_limit(problem.sm):
            return False
        if fields.get("pdl") and problem.sm < 90:
            return False
        return self._suits(problem)

    @abstractmethod
    def _suits(self, problem: Problem) -> bool:
        """Return whether the blocks suit the problem; they are powers of two and fit into shared memory."""

    @property
    def uses_pdl(self) -> bool:
        """Whether to use programmatic dependent launch: as configured, but never in the interpreter."""
        return vars(self).get("pdl", False) and not knobs.runtime.interpret


class GateUpConfig(Config):
    """A configuration of gate, up and activation: `[M, H]` -> `[M, I_padded]`."""

    @abstractmethod
    def plan(self, x: torch.Tensor, weights: GluWeights, problem: Problem) -> Plan:
        """Plan `act(gate(x)) * up(x)`, zero from the intermediate size on."""


@dataclass(frozen=True, kw_only=True)
class TiledGateUpConfig(GateUpConfig):
    """A configuration whose programs compute one tile of gate and one of up, in a pipelined loop over H."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_memory(self, problem: Problem) -> int:
        """Return the bytes of shared memory that a program takes."""
        row = self.block_m * problem.dtype.itemsize + 2 * self.block_n * problem.weight_itemsize
        return buffers(self.num_stages, problem.sm) * row * self.block_k

    def _suits(self, problem: Problem) -> bool:
        return min(self.block_m, self.block_n, self.block_k) >= 16 and PAD % self.block_n == 0


def pointer_arguments(x: torch.Tensor, a: torch.Tensor, weights: GluWeights, problem: Problem) -> dict:
    """Return the runtime arguments of the tiled kernels that load through pointers: `[M, H]` -> `[M, IP]`."""
    return dict(
        x=x,
        gate_up=weights.gate_up,
        a=a,
        gate_bias=weights.gate_bias,
        up_bias=weights.up_bias,
        M=x.shape[0],
        I=weights.intermediate_size,
        IP=problem.I_padded,
        UP=weights.up_row,
        H=problem.H,
        stride_x=x.stride(0),
    )


class DownConfig(Config):
    """A configuration of the down projection: `[M, I_padded]` -> `[M, H]`."""

    @abstractmethod
    def plan(self, a: torch.Tensor, weights: GluWeights, problem: Problem) -> Plan:
        """Plan `down(a)`. The columns of `a` from the intermediate size on are zero."""


@dataclass(frozen=True)
class Launch:
    """A path and the configurations of its two halves; None stands for cuBLAS."""

    path: str
    gate_up: GateUpConfig | None
    down: DownConfig | None


def buffers(num_stages: int, sm: int) -> int:
    """Return the tiles that a pipelined loop keeps in shared memory: wgmma and tcgen05 hold one while others arrive."""
    return num_stages if 90 <= sm < 120 else max(num_stages - 1, 1)
