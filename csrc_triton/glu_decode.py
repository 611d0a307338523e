"""gate and up projections with the activation for few tokens, where reading the weights is the whole cost.

Both kernels read every weight once. With PDL (programmatic dependent launch) a kernel starts while its predecessor on
the stream still runs, and waits for it before touching `x`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import glu, load_bias
from .launch import (
    GateUpGemv,
    GateUpSwap,
    KernelCall,
    Plan,
    cdiv,
    first_up_row,
    input_precision,
    next_power_of_2,
    uses_pdl,
)


@triton.jit(do_not_specialize=["I", "UP"])
def gate_up_gemv_kernel(
    x,
    gate_up,
    a,
    gate_bias,
    up_bias,
    I,
    UP,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
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
        if PDL:  # the weights are on their way, x may still be written by the kernel before
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        x_row = tl.load(x_ptrs).to(tl.float32)
    else:
        inside = columns < H
        gate_w = tl.load(gate_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
        up_w = tl.load(up_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        x_row = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    gate = tl.sum(gate_w.to(tl.float32) * x_row, 1)  # [BLOCK_N]
    up = tl.sum(up_w.to(tl.float32) * x_row, 1)
    if gate_bias is not None:
        gate += load_bias(gate_bias, neurons, I)
    if up_bias is not None:
        up += load_bias(up_bias, neurons, I)
    out = tl.where(neurons < I, glu(gate, up, ACTIVATION), 0.0)
    tl.store(a + neurons, out.to(a.dtype.element_ty))


def plan_gate_up_gemv(x, gate_up, intermediate_size, activation, gate_bias, up_bias, config: GateUpGemv) -> Plan:
    """`[1, H]` -> `[1, IP]`: each program loads whole rows of `BLOCK_N` neurons at once and sums them in float32.

    With PDL the weights are requested before the wait: the kernel launched just before must not write them.
    """
    _, IP, H = gate_up.shape
    a = torch.empty((x.shape[0], IP), dtype=x.dtype, device=x.device)
    pdl = uses_pdl(config)
    call = KernelCall(
        gate_up_gemv_kernel,
        (IP // config.block_n,),
        dict(
            x=x,
            gate_up=gate_up,
            a=a,
            gate_bias=gate_bias,
            up_bias=up_bias,
            I=intermediate_size,
            UP=first_up_row(gate_up),
        ),
        dict(H=H, BLOCK_H=next_power_of_2(H), BLOCK_N=config.block_n, ACTIVATION=activation, PDL=pdl),
        num_warps=config.num_warps,
        num_stages=1,
        launch_pdl=pdl,
    )
    return Plan(a, [call])


@triton.jit(do_not_specialize=["M", "I", "UP"])
def gate_up_swap_kernel(
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
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first = tl.program_id(1) * BLOCK_N
    neurons = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Eight gate rows, then the up rows of the same eight neurons, and so on: one dot for both, and the matrix unit
    # leaves both results of a neuron in one thread.
    r = tl.arange(0, 2 * BLOCK_N)
    rows = (r // 16) * 8 + r % 8 + (r // 8 % 2) * UP  # [2 * BLOCK_N], from the first gate row on
    columns = tl.arange(0, BLOCK_K)[None, :]
    w_ptrs = gate_up + first.to(tl.int64) * H + rows.to(tl.int64)[:, None] * H + columns  # [2 * BLOCK_N, BLOCK_K]
    # Rows past M read the last row again: unmasked loads, and the results are not stored.
    x_ptrs = x + tl.minimum(tokens, M - 1).to(tl.int64)[:, None] * stride_x + columns  # [BLOCK_M, BLOCK_K]
    acc = tl.zeros((2 * BLOCK_N, BLOCK_M), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for k in range(0, H, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs, eviction_policy="evict_first")
            x_tile = tl.load(x_ptrs)
        else:
            inside = columns + k < H
            w = tl.load(w_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
            x_tile = tl.load(x_ptrs, mask=inside, other=0.0)
        acc = tl.dot(w, x_tile.T, acc, input_precision=INPUT_PRECISION)  # [2 * BLOCK_N, BLOCK_M]
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 8, 2, 8, BLOCK_M)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)  # [BLOCK_N // 8, 8, BLOCK_M]
    gate = tl.reshape(gate, (BLOCK_N, BLOCK_M))
    up = tl.reshape(up, (BLOCK_N, BLOCK_M))
    if gate_bias is not None:
        gate += load_bias(gate_bias, neurons, I)[:, None]
    if up_bias is not None:
        up += load_bias(up_bias, neurons, I)[:, None]
    out = tl.where(neurons[:, None] < I, glu(gate, up, ACTIVATION), 0.0)
    a_ptrs = a + tokens.to(tl.int64)[None, :] * IP + neurons[:, None]  # [BLOCK_N, BLOCK_M]
    tl.store(a_ptrs, out.to(a.dtype.element_ty), mask=tokens[None, :] < M)


def plan_gate_up_swap(x, gate_up, intermediate_size, activation, gate_bias, up_bias, config: GateUpSwap) -> Plan:
    """`[M, H]` -> `[M, IP]`: the weights are the long operand of the matrix unit, the tokens the short one."""
    M = x.shape[0]
    _, IP, H = gate_up.shape
    a = torch.empty((x.shape[0], IP), dtype=x.dtype, device=x.device)
    pdl = uses_pdl(config)
    call = KernelCall(
        gate_up_swap_kernel,
        (cdiv(M, config.block_m), IP // config.block_n),
        dict(
            x=x,
            gate_up=gate_up,
            a=a,
            gate_bias=gate_bias,
            up_bias=up_bias,
            M=M,
            I=intermediate_size,
            IP=IP,
            UP=first_up_row(gate_up),
            H=H,
            stride_x=x.stride(0),
        ),
        dict(
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            EVEN_K=H % config.block_k == 0,
            ACTIVATION=activation,
            INPUT_PRECISION=input_precision(x.dtype),
            PDL=pdl,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
    )
    return Plan(a, [call])
