"""The down projection for few tokens.

The sum runs over the padded width IP, where both operands are zero from I on: exact, and every load is aligned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import DownGemv, DownSplitK, KernelCall, Plan, cdiv, input_precision, uses_pdl

SUM_BLOCK = 512


@triton.jit
def down_gemv_kernel(
    a,
    down,
    y,
    bias,
    H,
    IP,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = tl.arange(0, BLOCK_K)[None, :]
    w_ptrs = down + tl.minimum(rows, H - 1).to(tl.int64)[:, None] * IP + columns  # [BLOCK_N, BLOCK_K]
    # a takes the shape of a weight tile: loaded in the same layout, it needs no exchange through shared memory.
    a_ptrs = a + (rows * 0)[:, None] + columns
    w = tl.load(w_ptrs, mask=columns < IP, other=0.0, eviction_policy="evict_first")
    if PDL:  # the first weights are on their way, a is still being written by the kernel before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = w.to(tl.float32) * tl.load(a_ptrs, mask=columns < IP, other=0.0).to(tl.float32)
    for k in range(BLOCK_K, IP, BLOCK_K):
        inside = columns + k < IP
        w = tl.load(w_ptrs + k, mask=inside, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * tl.load(a_ptrs + k, mask=inside, other=0.0).to(tl.float32)
    out = tl.sum(acc, 1)  # [BLOCK_N]
    if bias is not None:
        out += tl.load(bias + rows, mask=rows < H, other=0.0).to(tl.float32)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=rows < H)


def plan_down_gemv(a, down, bias, config: DownGemv) -> Plan:
    """`[1, IP]` -> `[1, H]`.

    With PDL the first weights are requested before the wait: the kernel launched just before must not write them.
    """
    H, IP = down.shape
    y = torch.empty((1, H), dtype=a.dtype, device=a.device)
    pdl = uses_pdl(config)
    call = KernelCall(
        down_gemv_kernel,
        (cdiv(H, config.block_n),),
        dict(a=a, down=down, y=y, bias=bias, H=H, IP=IP),
        dict(BLOCK_N=config.block_n, BLOCK_K=config.block_k, PDL=pdl),
        num_warps=config.num_warps,
        num_stages=1,
        launch_pdl=pdl,
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
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    split = tl.program_id(2)
    columns = tl.arange(0, BLOCK_K)[None, :]
    # Rows past H and M read the last row again: unmasked loads, and the results are not stored.
    w_ptrs = down + tl.minimum(rows, H - 1).to(tl.int64)[:, None] * IP + columns  # [BLOCK_N, BLOCK_K]
    a_ptrs = a + tl.minimum(tokens, M - 1).to(tl.int64)[:, None] * IP + columns  # [BLOCK_M, BLOCK_K]
    steps = IP // BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for step in range(split * steps // SPLIT_K, (split + 1) * steps // SPLIT_K):
        k = step * BLOCK_K
        w = tl.load(w_ptrs + k, eviction_policy="evict_first")
        acc = tl.dot(w, tl.load(a_ptrs + k).T, acc, input_precision=INPUT_PRECISION)
    row_of_partials = split.to(tl.int64) * M + tokens  # [BLOCK_M]
    tl.store(
        partials + row_of_partials[None, :] * H + rows[:, None],
        acc,
        mask=(tokens[None, :] < M) & (rows[:, None] < H),
    )


@triton.jit(do_not_specialize=["M"])
def sum_partials_kernel(partials, y, bias, M, H, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = columns < H
    out = tl.zeros((BLOCK_N,), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for split in tl.static_range(SPLIT_K):  # always in this order: the same input gives the same bits
        out += tl.load(partials + (split * M + token) * H + columns, mask=inside, other=0.0)
    if bias is not None:
        out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * H + columns, out.to(y.dtype.element_ty), mask=inside)


def plan_down_splitk(a, down, bias, config: DownSplitK) -> Plan:
    """`[M, IP]` -> `[M, H]`: the width is cut into `split_k` ranges, so that few tokens still fill the chip.

    The float32 partial results `[split_k, M, H]` are added in a fixed order, without atomics.
    """
    M = a.shape[0]
    H, IP = down.shape
    partials = torch.empty((config.split_k, M, H), dtype=torch.float32, device=a.device)
    y = torch.empty((M, H), dtype=a.dtype, device=a.device)
    pdl = uses_pdl(config)
    product = KernelCall(
        down_splitk_kernel,
        (cdiv(M, config.block_m), cdiv(H, config.block_n), config.split_k),
        dict(a=a, down=down, partials=partials, M=M, H=H, IP=IP),
        dict(
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            SPLIT_K=config.split_k,
            INPUT_PRECISION=input_precision(a.dtype),
            PDL=pdl,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
    )
    total = KernelCall(
        sum_partials_kernel,
        (M, cdiv(H, SUM_BLOCK)),
        dict(partials=partials, y=y, bias=bias, M=M, H=H),
        dict(SPLIT_K=config.split_k, BLOCK_N=SUM_BLOCK, PDL=pdl),
        num_warps=4,
        num_stages=1,
        launch_pdl=pdl,
    )
    return Plan(y, [product, total])
