"""gate and up projections with the activation for many tokens.

Two GEMMs that share the tile of tokens and keep both results in registers until the activation combines them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton.glu.device_functions import biased_glu
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch.call import KernelCall, Plan
from csrc_triton.launch.configs import Problem, TiledGateUpConfig, pointer_arguments
from csrc_triton.launch.device import input_precision, sm_count
from csrc_triton.layout import cdiv, rows_aligned

# Tiles are visited in groups of this many rows of tiles, so that consecutive tiles share weights and tokens in the L2.
GROUP_M = 8


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row, column) of the tile grid, column by column within groups of GROUP_M rows."""
    group_size = GROUP_M * tiles_n
    first_m = (tile // group_size) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % group_size
    return first_m + within % height, within // height


@triton.jit(do_not_specialize=["M", "I", "UP"])
def gate_up_tile_kernel(
    x,
    gate_up,
    a,
    gate_bias,
    up_bias,
    M,
    I,
    IP,
    UP,
    H,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Map x `[M, H]` and gate_up `[2, IP, H]` to a `[M, IP]`; one tile per program."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), IP // BLOCK_N
    tile_m, tile_n = tile_position(tl.program_id(0), tiles_m, tiles_n, GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    neurons = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = tl.arange(0, BLOCK_K)[None, :]
    # Rows past M read the last row again, so that loads need no mask; the results are not stored.
    x_ptrs = x + tl.minimum(tokens, M - 1).to(tl.int64)[:, None] * stride_x + columns  # [BLOCK_M, BLOCK_K]
    gate_ptrs = gate_up + neurons.to(tl.int64)[:, None] * H + columns  # [BLOCK_N, BLOCK_K]
    up_ptrs = gate_up + (UP + neurons).to(tl.int64)[:, None] * H + columns
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        if EVEN_K:
            x_tile = tl.load(x_ptrs)
            gate_w = tl.load(gate_ptrs)
            up_w = tl.load(up_ptrs)
        else:
            inside = columns + k < H
            x_tile = tl.load(x_ptrs, mask=inside, other=0.0)
            gate_w = tl.load(gate_ptrs, mask=inside, other=0.0)
            up_w = tl.load(up_ptrs, mask=inside, other=0.0)
        gate = tl.dot(x_tile, gate_w.T, gate, input_precision=INPUT_PRECISION)
        up = tl.dot(x_tile, up_w.T, up, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    out = biased_glu(gate, up, gate_bias, up_bias, neurons, I, ACTIVATION, TOKEN_AXIS=0)
    a_ptrs = a + tokens.to(tl.int64)[:, None] * IP + neurons[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(a_ptrs, out.to(a.dtype.element_ty), mask=tokens[:, None] < M)


@dataclass(frozen=True, kw_only=True)
class GateUpTile(TiledGateUpConfig):
    """Many tokens: one tile of the result per program, ordinary pointers. For every chip and every H."""

    def plan(self, x: torch.Tensor, weights: GluWeights, problem: Problem) -> Plan:
        """Plan `[M, H]` -> `[M, IP]`."""
        M, H, IP = x.shape[0], problem.H, problem.I_padded
        a = torch.empty((M, IP), dtype=x.dtype, device=x.device)
        call = KernelCall(
            gate_up_tile_kernel,
            (cdiv(M, self.block_m) * (IP // self.block_n),),
            pointer_arguments(x, a, weights, problem),
            dict(
                BLOCK_M=self.block_m,
                BLOCK_N=self.block_n,
                BLOCK_K=self.block_k,
                GROUP_M=GROUP_M,
                EVEN_K=H % self.block_k == 0,
                ACTIVATION=weights.activation,
                INPUT_PRECISION=input_precision(x.dtype),
            ),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )
        return Plan(a, [call])


@triton.jit(do_not_specialize=["M", "I", "UP"])
def gate_up_tma_kernel(
    x,
    gate_up,
    a,
    gate_bias,
    up_bias,
    M,
    I,
    IP,
    UP,
    H,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The same with tensor descriptors of x, gate_up `[UP + IP, H]` and a; every n-th tile per program."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = IP // BLOCK_N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
        token = tile_m * BLOCK_M
        neuron = tile_n * BLOCK_N
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            x_tile = x.load([token, k])  # [BLOCK_M, BLOCK_K]
            gate_w = gate_up.load([neuron, k])  # [BLOCK_N, BLOCK_K]
            up_w = gate_up.load([UP + neuron, k])
            gate = tl.dot(x_tile, gate_w.T, gate, input_precision=INPUT_PRECISION)
            up = tl.dot(x_tile, up_w.T, up, input_precision=INPUT_PRECISION)
        neurons = neuron + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        out = biased_glu(gate, up, gate_bias, up_bias, neurons, I, ACTIVATION, TOKEN_AXIS=0)
        a.store([token, neuron], out.to(a.dtype))  # rows past M are dropped by the descriptor


@dataclass(frozen=True, kw_only=True)
class GateUpTma(TiledGateUpConfig):
    """Many tokens, with hardware tile copies (sm_90 and later).

    There are as many programs as multiprocessors, each taking every n-th tile. The rows of `x` and of the weights must
    start at 16-byte boundaries.
    """

    def shared_memory(self, problem: Problem) -> int:
        """Return the bytes of shared memory that a program takes."""
        result = self.block_m * self.block_n  # it is written through shared memory as well
        return super().shared_memory(problem) + result * problem.dtype.itemsize

    def _suits(self, problem: Problem) -> bool:
        if not super()._suits(problem):
            return False
        return problem.sm >= 90 and rows_aligned(problem.H, problem.dtype) and problem.H % self.block_k == 0

    def plan(self, x: torch.Tensor, weights: GluWeights, problem: Problem) -> Plan:
        """Plan `[M, H]` -> `[M, IP]`."""
        M, H, IP, UP = x.shape[0], problem.H, problem.I_padded, weights.up_row
        a = torch.empty((M, IP), dtype=x.dtype, device=x.device)
        gate_up = weights.gate_up.as_strided((UP + IP, H), (H, 1))  # both halves, which may overlap
        tiles = cdiv(M, self.block_m) * (IP // self.block_n)
        call = KernelCall(
            gate_up_tma_kernel,
            (min(tiles, sm_count(x.device, problem.sm)),),
            dict(
                x=TensorDescriptor.from_tensor(x, [self.block_m, self.block_k]),
                gate_up=TensorDescriptor.from_tensor(gate_up, [self.block_n, self.block_k]),
                a=TensorDescriptor.from_tensor(a, [self.block_m, self.block_n]),
                gate_bias=weights.gate_bias,
                up_bias=weights.up_bias,
                M=M,
                I=weights.intermediate_size,
                IP=IP,
                UP=UP,
                H=H,
            ),
            dict(
                BLOCK_M=self.block_m,
                BLOCK_N=self.block_n,
                BLOCK_K=self.block_k,
                GROUP_M=GROUP_M,
                ACTIVATION=weights.activation,
                INPUT_PRECISION=input_precision(x.dtype),
            ),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )
        return Plan(a, [call])
