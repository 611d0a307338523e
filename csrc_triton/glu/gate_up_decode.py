"""gate and up projections with the activation for few tokens, where reading the weights dominates the cost.

Both kernels read every weight once. With PDL (programmatic dependent launch) a kernel starts while the previous kernel
of the stream still runs, and waits for it before reading `x`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from csrc_triton.glu.device_functions import biased_glu, scaled, wait_for_previous_kernel
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch.call import KernelCall, Plan
from csrc_triton.launch.configs import GateUpConfig, Problem, TiledGateUpConfig, pointer_arguments
from csrc_triton.launch.device import input_precision
from csrc_triton.layout import PAD, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["I", "UP"])
def gate_up_gemv_kernel(
    x,
    gate_up,
    a,
    gate_bias,
    up_bias,
    gate_scale,
    up_scale,
    I,
    UP,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Map x `[1, H]` and gate_up `[2, IP, H]` to a `[1, IP]`; whole rows of BLOCK_N neurons per program."""
    neurons = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = tl.arange(0, BLOCK_H)[None, :]  # [1, BLOCK_H]
    rows = neurons.to(tl.int64)[:, None]
    gate_ptrs = gate_up + rows * H + columns  # [BLOCK_N, BLOCK_H]
    up_ptrs = gate_up + (UP + rows) * H + columns
    # x takes the shape of a weight tile: loaded in the same layout, it needs no exchange through shared memory.
    x_ptrs = x + (rows * 0) + columns
    if H == BLOCK_H:
        gate_w = tl.load(gate_ptrs, eviction_policy="evict_first")
        up_w = tl.load(up_ptrs, eviction_policy="evict_first")
        # The weights are requested already; x is complete only when the previous kernel has ended.
        wait_for_previous_kernel(PDL)
        x_row = tl.load(x_ptrs).to(tl.float32)
    else:
        inside = columns < H
        gate_w = tl.load(gate_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
        up_w = tl.load(up_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
        wait_for_previous_kernel(PDL)
        x_row = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    gate = scaled(tl.sum(gate_w.to(tl.float32) * x_row, 1), gate_scale, neurons, I, TOKEN_AXIS=None)  # [BLOCK_N]
    up = scaled(tl.sum(up_w.to(tl.float32) * x_row, 1), up_scale, neurons, I, TOKEN_AXIS=None)
    out = biased_glu(gate, up, gate_bias, up_bias, neurons, I, ACTIVATION, TOKEN_AXIS=None)
    tl.store(a + neurons, out.to(a.dtype.element_ty))


@dataclass(frozen=True, kw_only=True)
class GateUpGemv(GateUpConfig):
    """One token: each program loads whole rows of `block_n` neurons at once and sums them in float32."""

    block_n: int
    num_warps: int
    pdl: bool

    def _suits(self, problem: Problem) -> bool:
        return problem.M == 1 and PAD % self.block_n == 0

    def plan(self, x: torch.Tensor, weights: GluWeights, problem: Problem) -> Plan:
        """Plan `[1, H]` -> `[1, IP]`.

        With PDL the weights are requested before the wait: the previous kernel must not write them.
        """
        H, IP = problem.H, problem.I_padded
        a = torch.empty((x.shape[0], IP), dtype=x.dtype, device=x.device)
        call = KernelCall(
            gate_up_gemv_kernel,
            (IP // self.block_n,),
            dict(
                x=x,
                gate_up=weights.gate_up,
                a=a,
                gate_bias=weights.gate_bias,
                up_bias=weights.up_bias,
                gate_scale=weights.gate_scale,
                up_scale=weights.up_scale,
                I=weights.intermediate_size,
                UP=weights.up_row,
            ),
            dict(
                H=H,
                BLOCK_H=next_power_of_2(H),
                BLOCK_N=self.block_n,
                ACTIVATION=weights.activation,
                PDL=self.uses_pdl,
            ),
            num_warps=self.num_warps,
            num_stages=1,
            launch_pdl=self.uses_pdl,
        )
        return Plan(a, [call])


@triton.jit(do_not_specialize=["M", "I", "UP"])
def gate_up_swap_kernel(
    x,
    gate_up,
    a,
    gate_bias,
    up_bias,
    gate_scale,
    up_scale,
    M,
    I,
    IP,
    UP,
    H,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Map x `[M, H]` and gate_up `[2, IP, H]` to a `[M, IP]`; BLOCK_N neurons and BLOCK_M tokens per program."""
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first = tl.program_id(1) * BLOCK_N
    neurons = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Eight gate rows, then the up rows of the same eight neurons, and so on: one dot for both, and the matrix unit
    # leaves both results of a neuron in one thread.
    r = tl.arange(0, 2 * BLOCK_N)
    rows = (r // 16) * 8 + r % 8 + (r // 8 % 2) * UP  # [2 * BLOCK_N], from the first gate row on
    columns = tl.arange(0, BLOCK_K)[None, :]
    w_ptrs = gate_up + first.to(tl.int64) * H + rows.to(tl.int64)[:, None] * H + columns  # [2 * BLOCK_N, BLOCK_K]
    # Rows past M read the last row again, so that loads need no mask; the results are not stored.
    x_ptrs = x + tl.minimum(tokens, M - 1).to(tl.int64)[:, None] * stride_x + columns  # [BLOCK_M, BLOCK_K]
    acc = tl.zeros((2 * BLOCK_N, BLOCK_M), tl.float32)
    wait_for_previous_kernel(PDL)
    for k in range(0, H, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs, eviction_policy="evict_first")
            x_tile = tl.load(x_ptrs)
        else:
            inside = columns + k < H
            w = tl.load(w_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
            x_tile = tl.load(x_ptrs, mask=inside, other=0.0)
        w = w.to(x_tile.dtype)  # of fp8 weights; others have that dtype
        acc = tl.dot(w, x_tile.T, acc, input_precision=INPUT_PRECISION)  # [2 * BLOCK_N, BLOCK_M]
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 8, 2, 8, BLOCK_M)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)  # [BLOCK_N // 8, 8, BLOCK_M]
    gate = scaled(tl.reshape(gate, (BLOCK_N, BLOCK_M)), gate_scale, neurons, I, TOKEN_AXIS=1)
    up = scaled(tl.reshape(up, (BLOCK_N, BLOCK_M)), up_scale, neurons, I, TOKEN_AXIS=1)
    out = biased_glu(gate, up, gate_bias, up_bias, neurons, I, ACTIVATION, TOKEN_AXIS=1)
    a_ptrs = a + tokens.to(tl.int64)[None, :] * IP + neurons[:, None]  # [BLOCK_N, BLOCK_M]
    tl.store(a_ptrs, out.to(a.dtype.element_ty), mask=tokens[None, :] < M)


@dataclass(frozen=True, kw_only=True)
class GateUpSwap(TiledGateUpConfig):
    """Few tokens: the weights are the long operand of the matrix unit, the tokens the short one."""

    pdl: bool

    def plan(self, x: torch.Tensor, weights: GluWeights, problem: Problem) -> Plan:
        """Plan `[M, H]` -> `[M, IP]`."""
        M, H, IP = x.shape[0], problem.H, problem.I_padded
        a = torch.empty((M, IP), dtype=x.dtype, device=x.device)
        call = KernelCall(
            gate_up_swap_kernel,
            (cdiv(M, self.block_m), IP // self.block_n),
            pointer_arguments(x, a, weights, problem) | dict(gate_scale=weights.gate_scale, up_scale=weights.up_scale),
            dict(
                BLOCK_M=self.block_m,
                BLOCK_N=self.block_n,
                BLOCK_K=self.block_k,
                EVEN_K=H % self.block_k == 0,
                ACTIVATION=weights.activation,
                INPUT_PRECISION=input_precision(x.dtype),
                PDL=self.uses_pdl,
            ),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            launch_pdl=self.uses_pdl,
        )
        return Plan(a, [call])
