"""The down projection for few tokens.

The sum runs over the padded width IP, where both operands are zero from I on: the result is exact, and every load is
aligned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from csrc_triton.glu.device_functions import scaled, wait_for_previous_kernel
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch.call import KernelCall, Plan
from csrc_triton.launch.configs import DownConfig, Problem, buffers
from csrc_triton.launch.device import input_precision
from csrc_triton.layout import PAD, cdiv

SUM_BLOCK = 512


@triton.jit
def down_gemv_kernel(
    a,
    down,
    y,
    bias,
    scale,
    H,
    IP,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Map a `[1, IP]` and down `[H, IP]` to y `[1, H]`; BLOCK_N outputs per program."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = tl.arange(0, BLOCK_K)[None, :]
    w_ptrs = down + tl.minimum(rows, H - 1).to(tl.int64)[:, None] * IP + columns  # [BLOCK_N, BLOCK_K]
    # a takes the shape of a weight tile: loaded in the same layout, it needs no exchange through shared memory.
    a_ptrs = a + (rows * 0)[:, None] + columns
    w = tl.load(w_ptrs, mask=columns < IP, other=0.0, eviction_policy="evict_first")
    # The first weights are requested already; a is complete only when the previous kernel has ended.
    wait_for_previous_kernel(PDL)
    acc = w.to(tl.float32) * tl.load(a_ptrs, mask=columns < IP, other=0.0).to(tl.float32)
    for k in range(BLOCK_K, IP, BLOCK_K):
        inside = columns + k < IP
        w = tl.load(w_ptrs + k, mask=inside, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * tl.load(a_ptrs + k, mask=inside, other=0.0).to(tl.float32)
    out = scaled(tl.sum(acc, 1), scale, rows, H, TOKEN_AXIS=None)  # [BLOCK_N]
    if bias is not None:
        out += tl.load(bias + rows, mask=rows < H, other=0.0).to(tl.float32)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=rows < H)


@dataclass(frozen=True, kw_only=True)
class DownGemv(DownConfig):
    """One token: each program sums whole rows of `block_n` outputs."""

    block_n: int
    block_k: int
    num_warps: int
    pdl: bool

    def _suits(self, problem: Problem) -> bool:
        return problem.M == 1

    def plan(self, a: torch.Tensor, weights: GluWeights, problem: Problem) -> Plan:
        """Plan `[1, IP]` -> `[1, H]`.

        With PDL the first weights are requested before the wait: the previous kernel must not write them.
        """
        H = problem.H
        y = torch.empty((1, H), dtype=a.dtype, device=a.device)
        call = KernelCall(
            down_gemv_kernel,
            (cdiv(H, self.block_n),),
            dict(
                a=a, down=weights.down, y=y, bias=weights.down_bias, scale=weights.down_scale, H=H, IP=problem.I_padded
            ),
            dict(BLOCK_N=self.block_n, BLOCK_K=self.block_k, PDL=self.uses_pdl),
            num_warps=self.num_warps,
            num_stages=1,
            launch_pdl=self.uses_pdl,
        )
        return Plan(y, [call])


@triton.jit(do_not_specialize=["M"])
def down_splitk_kernel(
    a,
    down,
    partials,
    M,
    H,
    IP,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Map a `[M, IP]` and down `[H, IP]` to float32 partials `[SPLIT_K, M, H]`; one tile and range of K per program."""
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    split = tl.program_id(2)
    columns = tl.arange(0, BLOCK_K)[None, :]
    # Rows past H and M read the last row again, so that loads need no mask; the results are not stored.
    w_ptrs = down + tl.minimum(rows, H - 1).to(tl.int64)[:, None] * IP + columns  # [BLOCK_N, BLOCK_K]
    a_ptrs = a + tl.minimum(tokens, M - 1).to(tl.int64)[:, None] * IP + columns  # [BLOCK_M, BLOCK_K]
    steps = IP // BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    wait_for_previous_kernel(PDL)
    for step in range(split * steps // SPLIT_K, (split + 1) * steps // SPLIT_K):
        k = step * BLOCK_K
        w = tl.load(w_ptrs + k, eviction_policy="evict_first")
        a_tile = tl.load(a_ptrs + k)
        acc = tl.dot(w.to(a_tile.dtype), a_tile.T, acc, input_precision=INPUT_PRECISION)  # fp8 weights become a's dtype
    row_of_partials = split.to(tl.int64) * M + tokens  # [BLOCK_M]
    tl.store(
        partials + row_of_partials[None, :] * H + rows[:, None],
        acc,
        mask=(tokens[None, :] < M) & (rows[:, None] < H),
    )


@triton.jit(do_not_specialize=["M"])
def sum_partials_kernel(
    partials, y, bias, scale, M, H, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr
):
    """Map partials `[SPLIT_K, M, H]` to y `[M, H]`; one token and BLOCK_N outputs per program."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = columns < H
    out = tl.zeros((BLOCK_N,), tl.float32)
    wait_for_previous_kernel(PDL)
    for split in tl.static_range(SPLIT_K):  # always in this order: the same input gives the same bits
        out += tl.load(partials + (split * M + token) * H + columns, mask=inside, other=0.0)
    out = scaled(out, scale, columns, H, TOKEN_AXIS=None)
    if bias is not None:
        out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * H + columns, out.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True, kw_only=True)
class DownSplitK(DownConfig):
    """Few tokens: the width is split into `split_k` ranges, so that few tokens still fill the chip.

    The float32 partial results `[split_k, M, H]` are added in a fixed order, without atomics.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    pdl: bool

    def shared_memory(self, problem: Problem) -> int:
        """Return the bytes of shared memory that a program takes."""
        row = self.block_m * problem.dtype.itemsize + self.block_n * problem.weight_itemsize
        return buffers(self.num_stages, problem.sm) * row * self.block_k

    def _suits(self, problem: Problem) -> bool:
        if min(self.block_m, self.block_n, self.block_k) < 16:
            return False
        # K runs over the padded width without a mask.
        return PAD % self.block_k == 0 and 1 <= self.split_k <= problem.I_padded // self.block_k

    def plan(self, a: torch.Tensor, weights: GluWeights, problem: Problem) -> Plan:
        """Plan `[M, IP]` -> `[M, H]`: the product, then the sum of its partial results."""
        M, H = a.shape[0], problem.H
        partials = torch.empty((self.split_k, M, H), dtype=torch.float32, device=a.device)
        y = torch.empty((M, H), dtype=a.dtype, device=a.device)
        product = KernelCall(
            down_splitk_kernel,
            (cdiv(M, self.block_m), cdiv(H, self.block_n), self.split_k),
            dict(a=a, down=weights.down, partials=partials, M=M, H=H, IP=problem.I_padded),
            dict(
                BLOCK_M=self.block_m,
                BLOCK_N=self.block_n,
                BLOCK_K=self.block_k,
                SPLIT_K=self.split_k,
                INPUT_PRECISION=input_precision(a.dtype),
                PDL=self.uses_pdl,
            ),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            launch_pdl=self.uses_pdl,
        )
        total = KernelCall(
            sum_partials_kernel,
            (M, cdiv(H, SUM_BLOCK)),
            dict(partials=partials, y=y, bias=weights.down_bias, scale=weights.down_scale, M=M, H=H),
            dict(SPLIT_K=self.split_k, BLOCK_N=SUM_BLOCK, PDL=self.uses_pdl),
            num_warps=4,
            num_stages=1,
            launch_pdl=self.uses_pdl,
        )
        return Plan(y, [product, total])
