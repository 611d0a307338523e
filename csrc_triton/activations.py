"""The activations of GLU MLPs, and the elementwise half of the packed GEMM path.

A GLU MLP (Shazeer, "GLU Variants Improve Transformer", 2020, eq. 5-6) computes `down(act(gate(x)) * up(x))`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import KernelCall, Plan, cdiv

ACTIVATIONS = ("silu", "gelu_tanh")
ACT_MUL_BLOCK = 1024


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    # 0.5 (1 + tanh z) = 1 / (1 + exp(-2 z)): nothing cancels, and an overflowing exp gives the limit.
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * z))


@triton.jit
def glu(gate, up, ACTIVATION: tl.constexpr):
    """act(gate) * up, in float32."""
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu_tanh")
    if ACTIVATION == "silu":
        return silu(gate) * up
    else:
        return gelu_tanh(gate) * up


@triton.jit
def load_bias(bias, neurons, I):
    return tl.load(bias + neurons, mask=neurons < I, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["I"])
def act_mul_kernel(h, a, gate_bias, up_bias, I, IP, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    neurons = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    stored = neurons < IP
    gate = tl.load(h + row * 2 * IP + neurons, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * IP + IP + neurons, mask=stored, other=0.0).to(tl.float32)
    if gate_bias is not None:
        gate += load_bias(gate_bias, neurons, I)
    if up_bias is not None:
        up += load_bias(up_bias, neurons, I)
    out = tl.where(neurons < I, glu(gate, up, ACTIVATION), 0.0)
    tl.store(a + row * IP + neurons, out.to(a.dtype.element_ty), mask=stored)


def plan_act_mul(h, intermediate_size, activation="silu", gate_bias=None, up_bias=None) -> Plan:
    """act(gate + gate_bias) * (up + up_bias) of packed projections `h` `[M, 2 * IP]` -> `[M, IP]`, zero from I on."""
    M, IP = h.shape[0], h.shape[1] // 2
    a = torch.empty((M, IP), dtype=h.dtype, device=h.device)
    call = KernelCall(
        act_mul_kernel,
        (M, cdiv(IP, ACT_MUL_BLOCK)),
        dict(h=h, a=a, gate_bias=gate_bias, up_bias=up_bias, I=intermediate_size, IP=IP),
        dict(ACTIVATION=activation, BLOCK_N=ACT_MUL_BLOCK),
        num_warps=4,
        num_stages=1,
    )
    return Plan(a, [call])
