"""The plain PyTorch equivalent of every planned kernel: same weights, same result layout, sums in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from csrc_triton.glu.weights import GluWeights


def activation_reference(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Return the activation of `x`: "silu" or "gelu_tanh"."""
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def act_mul_reference(h: torch.Tensor, weights: GluWeights) -> torch.Tensor:
    """Equivalent of `plan_act_mul`: `[M, 2 * IP]` -> `[M, IP]`, computed in float32, zero from I on."""
    I = weights.intermediate_size
    gate, up = h.float().chunk(2, dim=1)
    gate, up = gate[:, :I], up[:, :I]
    if weights.gate_bias is not None:
        gate = gate + weights.gate_bias.float()
    if weights.up_bias is not None:
        up = up + weights.up_bias.float()
    hidden = (activation_reference(gate, weights.activation) * up).to(h.dtype)
    return F.pad(hidden, (0, h.shape[1] // 2 - I))


def glu_gradient_reference(h: torch.Tensor, a: torch.Tensor, weights: GluWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Equivalent of `glu_gradient_call`: the gradient of `h` `[M, 2 * IP]` and the hidden activations `[M, IP]`."""
    projections = h.float().requires_grad_()
    with torch.enable_grad():
        hidden = act_mul_reference(projections, weights)
    (gradient,) = torch.autograd.grad(hidden, projections, a.float())
    return gradient.to(h.dtype), hidden.detach().to(a.dtype)


def gate_up_reference(x: torch.Tensor, weights: GluWeights) -> torch.Tensor:
    """Equivalent of the gate_up kernels: `[M, H]` -> `[M, IP]`, sums and activation in float32, zero from I on."""
    h = x.float() @ weights.gate_up.float().flatten(0, 1).t()
    return act_mul_reference(h, weights).to(x.dtype)


def down_reference(a: torch.Tensor, weights: GluWeights) -> torch.Tensor:
    """Equivalent of the down kernels: `[M, IP]` -> `[M, H]`, summed in float32."""
    y = a.float() @ weights.down.float().t()
    return (y if weights.down_bias is None else y + weights.down_bias.float()).to(a.dtype)


def glu_mlp_reference(x: torch.Tensor, weights: GluWeights) -> torch.Tensor:
    """Twin of `glu_mlp`."""
    return down_reference(gate_up_reference(x, weights), weights)
