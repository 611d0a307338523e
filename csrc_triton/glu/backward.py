"""The backward pass of a GLU MLP on padded weights, with gate and up computed again from the tokens.

One elementwise kernel turns the projections and the gradient of the hidden activations into everything that the
products need, in place; all products are cuBLAS's, over padded widths. Beside the gradients, three tensors of the
intermediate width exist at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from csrc_triton.glu.act_mul import plan_act_mul
from csrc_triton.glu.device_functions import activation_and_slope, load_bias
from csrc_triton.glu.forward import plan_gate_up_matmul
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch.call import KernelCall
from csrc_triton.layout import cdiv, padded_width

GRADIENT_BLOCK = 1024


class GluGradients(NamedTuple):
    """The gradients of one GLU MLP in the dtype of its weights, or None where not wanted; I is its width.

    Attributes:
        x: `[M, H]`.
        gate_up: `[2, I, H]`, contiguous: of gate, then of up.
        down: `[H, I]`, contiguous.
        gate_up_bias: `[2, I]`.
    """

    x: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None


@triton.jit(do_not_specialize=["I"])
def glu_gradient_kernel(
    h, a, gate_bias, up_bias, I, IP, ACTIVATION: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Overwrite h `[M, 2 * IP]` (gate, then up) by its gradient, and a `[M, IP]`, zero from I on.

    `a` comes as the gradient of the hidden activations, and becomes these activations if HIDDEN. One token and BLOCK_N
    neurons per program.
    """
    row = tl.program_id(0).to(tl.int64)
    neurons = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    stored = neurons < IP
    gates, ups, hidden = h + row * 2 * IP + neurons, h + row * 2 * IP + IP + neurons, a + row * IP + neurons
    gate = tl.load(gates, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(ups, mask=stored, other=0.0).to(tl.float32)
    gradient = tl.load(hidden, mask=stored, other=0.0).to(tl.float32)
    if gate_bias is not None:
        gate += load_bias(gate_bias, neurons, I)
    if up_bias is not None:
        up += load_bias(up_bias, neurons, I)
    activation, slope = activation_and_slope(gate, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues]
    real = neurons < I
    tl.store(gates, tl.where(real, gradient * up * slope, 0.0).to(h.dtype.element_ty), mask=stored)
    tl.store(ups, tl.where(real, gradient * activation, 0.0).to(h.dtype.element_ty), mask=stored)
    if HIDDEN:
        tl.store(hidden, tl.where(real, activation * up, 0.0).to(a.dtype.element_ty), mask=stored)


def glu_gradient_call(h: torch.Tensor, a: torch.Tensor, weights: GluWeights, *, hidden: bool) -> KernelCall:
    """Return the launch that overwrites projections with their gradients. All is computed in float32, rounded once.

    Args:
        h: `[M, 2 * IP]`, the gate and up projections without biases; becomes their gradient.
        a: `[M, IP]`, the gradient of `act(gate) * up`; becomes `act(gate) * up` if `hidden`.
        weights: whose biases, activation and intermediate size are used.
        hidden: whether to overwrite `a`.
    """
    M, IP = a.shape
    return KernelCall(
        glu_gradient_kernel,
        (M, cdiv(IP, GRADIENT_BLOCK)),
        dict(
            h=h,
            a=a,
            gate_bias=weights.gate_bias,
            up_bias=weights.up_bias,
            I=weights.intermediate_size,
            IP=IP,
        ),
        dict(ACTIVATION=weights.activation, HIDDEN=hidden, BLOCK_N=GRADIENT_BLOCK),
        num_warps=4,
        num_stages=1,
    )


def glu_mlp_backward(
    grad: torch.Tensor, x: torch.Tensor, weights: GluWeights, wanted: Collection[str] = GluGradients._fields
) -> GluGradients:
    """Compute gradients of `glu_mlp`. No autograd; the arguments are not checked.

    Gate, up, the gradient of the hidden activations, and both operands of the last products are rounded to the dtype of
    x, all else is float32: products accumulate in it, except that two products are added in the dtype of x for the
    gradient of x if gate and up are not adjacent.

    Args:
        grad: `[M, H]`, the gradient of the output, of x's dtype and device.
        x: `[M, H]`, at least one token.
        weights: the weights in the padded layout, with finite values in the padding. `down` may also be `[H, I]`: it is
            then padded for the time of one product.
        wanted: Names of the gradients to compute; the others are None.

    Returns:
        New tensors.
    """
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
        return _gradients(grad, x, weights, wanted)


def _gradients(grad: torch.Tensor, x: torch.Tensor, weights: GluWeights, wanted: Collection[str]) -> GluGradients:
    I, (M, H) = weights.intermediate_size, x.shape
    IP = padded_width(I)
    grad = grad.contiguous()
    h = plan_gate_up_matmul(x, weights).run()  # [M, 2 * IP]
    if not {"x", "gate_up", "gate_up_bias"}.isdisjoint(wanted):
        a = grad @ _padded(weights.down, IP)  # [M, IP]
        glu_gradient_call(h, a, weights, hidden="down" in wanted).run()
    else:
        a = plan_act_mul(h, weights).run()
    found: dict[str, torch.Tensor] = {}
    if "down" in wanted:
        found["down"] = (grad.t() @ a)[:, :I].contiguous()  # over the padded width, whose rows are aligned
    del a
    if "x" in wanted:
        found["x"] = _input_gradient(h, weights)
    halves = h.view(M, 2, IP)[:, :, :I]
    if "gate_up" in wanted:
        found["gate_up"] = torch.bmm(halves.permute(1, 2, 0), x.expand(2, M, H))
    if "gate_up_bias" in wanted:
        found["gate_up_bias"] = halves.sum(0)
    return GluGradients(**found)


def _padded(down: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - down.shape[1]
    return F.pad(down, (0, missing)) if missing else down


def _input_gradient(h: torch.Tensor, weights: GluWeights) -> torch.Tensor:
    """Return `[M, 2 * IP]` times the weights: one product, or two where gate and up are not adjacent."""
    if weights.up is None and weights.gate_up.is_contiguous():
        return h @ weights.gate_up.flatten(0, 1)
    (gate, up), rows = weights.halves, weights.halves[0].shape[0]
    of_gate, of_up = h.chunk(2, dim=1)
    return (of_gate[:, :rows] @ gate).addmm_(of_up[:, :rows], up)
