"""gate and up projections with the activation for many tokens.

Two GEMMs that share the tile of tokens and keep both results in registers until the activation has joined them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .activations import glu, load_bias
from .launch import GateUpTile, GateUpTma, KernelCall, Plan, cdiv, first_up_row, input_precision, multiprocessors

# Tiles are visited in groups of this many rows of tiles, so that neighbours in time share weights and tokens in the L2.
GROUP_M = 8


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row, column) of the tile grid, column by column within groups of GROUP_M rows."""
    group_size = GROUP_M * tiles_n
    first_m = (tile // group_size) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % group_size
    return first_m + within % height, within // height


@triton.jit
def glu_tile(gate, up, gate_bias, up_bias, neurons, I, ACTIVATION: tl.constexpr):
    """Biases and activation on a `[BLOCK_M, BLOCK_N]` pair; neurons from I on become zero."""
    if gate_bias is not None:
        gate += load_bias(gate_bias, neurons, I)[None, :]
    if up_bias is not None:
        up += load_bias(up_bias, neurons, I)[None, :]
    return tl.where(neurons[None, :] < I, glu(gate, up, ACTIVATION), 0.0)


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
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), IP // BLOCK_N, GROUP_M)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    neurons = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = tl.arange(0, BLOCK_K)[None, :]
    # Rows past M read the last row again: unmasked loads, and the results are not stored.
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
    out = glu_tile(gate, up, gate_bias, up_bias, neurons, I, ACTIVATION)
    a_ptrs = a + tokens.to(tl.int64)[:, None] * IP + neurons[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(a_ptrs, out.to(a.dtype.element_ty), mask=tokens[:, None] < M)


def plan_gate_up_tile(x, gate_up, intermediate_size, activation, gate_bias, up_bias, config: GateUpTile) -> Plan:
    """`[M, H]` -> `[M, IP]`, one tile of the result a program, ordinary pointers: every chip and every H."""
    M = x.shape[0]
    (_, IP, H), UP = gate_up.shape, first_up_row(gate_up)
    a = torch.empty((M, IP), dtype=x.dtype, device=x.device)
    call = KernelCall(
        gate_up_tile_kernel,
        (cdiv(M, config.block_m) * (IP // config.block_n),),
        dict(
            x=x,
            gate_up=gate_up,
            a=a,
            gate_bias=gate_bias,
            up_bias=up_bias,
            M=M,
            I=intermediate_size,
            IP=IP,
            UP=UP,
            H=H,
            stride_x=x.stride(0),
        ),
        dict(
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=GROUP_M,
            EVEN_K=H % config.block_k == 0,
            ACTIVATION=activation,
            INPUT_PRECISION=input_precision(x.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
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
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = IP // BLOCK_N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
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
        out = glu_tile(gate, up, gate_bias, up_bias, neuron + tl.arange(0, BLOCK_N), I, ACTIVATION)
        a.store([token, neuron], out.to(a.dtype))  # rows past M are dropped by the descriptor


def plan_gate_up_tma(x, gate_up, intermediate_size, activation, gate_bias, up_bias, config: GateUpTma, sm: int) -> Plan:
    """`[M, H]` -> `[M, IP]` with hardware tile copies (sm_90 and later).

    As many programs as multiprocessors, each taking every n-th tile. The rows of `x` and of the weights must start at
    16-byte boundaries.
    """
    M = x.shape[0]
    (_, IP, H), UP = gate_up.shape, first_up_row(gate_up)
    a = torch.empty((M, IP), dtype=x.dtype, device=x.device)
    weights = gate_up.as_strided((UP + IP, H), (H, 1))  # both halves, which may overlap
    tiles = cdiv(M, config.block_m) * (IP // config.block_n)
    call = KernelCall(
        gate_up_tma_kernel,
        (min(tiles, multiprocessors(x.device, sm)),),
        dict(
            x=TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            gate_up=TensorDescriptor.from_tensor(weights, [config.block_n, config.block_k]),
            a=TensorDescriptor.from_tensor(a, [config.block_m, config.block_n]),
            gate_bias=gate_bias,
            up_bias=up_bias,
            M=M,
            I=intermediate_size,
            IP=IP,
            UP=UP,
            H=H,
        ),
        dict(
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=GROUP_M,
            ACTIVATION=activation,
            INPUT_PRECISION=input_precision(x.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return Plan(a, [call])
