"""The elementwise half of the packed GEMM path: bias, activation and product of packed projections.

A GLU MLP (Shazeer, "GLU Variants Improve Transformer", 2020, eq. 5-6) computes `down(act(gate(x)) * up(x))`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from csrc_triton.glu.device_functions import biased_glu
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch.call import KernelCall, Plan
from csrc_triton.layout import cdiv

ACT_MUL_BLOCK = 1024


@triton.jit(do_not_specialize=["I"])
def act_mul_kernel(h, a, gate_bias, up_bias, I, IP, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    """Map h `[M, 2 * IP]` (gate, then up) to a `[M, IP]`; one token and BLOCK_N neurons per program."""
    row = tl.program_id(0).to(tl.int64)
    neurons = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    stored = neurons < IP
    gate = tl.load(h + row * 2 * IP + neurons, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * IP + IP + neurons, mask=stored, other=0.0).to(tl.float32)
    out = biased_glu(gate, up, gate_bias, up_bias, neurons, I, ACTIVATION, TOKEN_AXIS=None)
    tl.store(a + row * IP + neurons, out.to(a.dtype.element_ty), mask=stored)


def plan_act_mul(h: torch.Tensor, weights: GluWeights) -> Plan:
    """Plan act(gate + gate_bias) * (up + up_bias) of packed projections.

    Args:
        h: `[M, 2 * IP]`, the gate and up projections without biases.
        weights: whose biases, activation and intermediate size are used.

    Returns:
        The plan of `[M, IP]`, zero from the intermediate size on.
    """
    M, IP = h.shape[0], h.shape[1] // 2
    a = torch.empty((M, IP), dtype=h.dtype, device=h.device)
    call = KernelCall(
        act_mul_kernel,
        (M, cdiv(IP, ACT_MUL_BLOCK)),
        dict(
            h=h,
            a=a,
            gate_bias=weights.gate_bias,
            up_bias=weights.up_bias,
            I=weights.intermediate_size,
            IP=IP,
        ),
        dict(ACTIVATION=weights.activation, BLOCK_N=ACT_MUL_BLOCK),
        num_warps=4,
        num_stages=1,
    )
    return Plan(a, [call])
