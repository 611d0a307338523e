"""The plain PyTorch twin of every planned kernel: same arguments, same result layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activation_reference(x: torch.Tensor, activation: str) -> torch.Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def act_mul_reference(h, intermediate_size, activation="silu", gate_bias=None, up_bias=None) -> torch.Tensor:
    """Twin of `plan_act_mul`: `[M, 2 * IP]` -> `[M, IP]`, computed in float32, zero from I on."""
    I = intermediate_size
    gate, up = h.float().chunk(2, dim=1)
    gate, up = gate[:, :I], up[:, :I]
    if gate_bias is not None:
        gate = gate + gate_bias.float()
    if up_bias is not None:
        up = up + up_bias.float()
    hidden = (activation_reference(gate, activation) * up).to(h.dtype)
    return F.pad(hidden, (0, h.shape[1] // 2 - I))


def gate_up_reference(x, gate_up, intermediate_size, activation="silu", gate_bias=None, up_bias=None) -> torch.Tensor:
    """Twin of `plan_gate_up_*`: `[M, H]` -> `[M, IP]`, sums and activation in float32, zero from I on."""
    h = x.float() @ gate_up.float().flatten(0, 1).t()
    return act_mul_reference(h, intermediate_size, activation, gate_bias, up_bias).to(x.dtype)


def down_reference(a, down, bias=None) -> torch.Tensor:
    """Twin of `plan_down_*`: `[M, IP]` -> `[M, H]`, summed in float32."""
    y = a.float() @ down.float().t()
    return (y if bias is None else y + bias.float()).to(a.dtype)


def glu_mlp_reference(
    x, gate_up, down, intermediate_size, activation="silu", gate_bias=None, up_bias=None, down_bias=None
) -> torch.Tensor:
    """Twin of `glu_mlp`."""
    a = gate_up_reference(x, gate_up, intermediate_size, activation, gate_bias, up_bias)
    return down_reference(a, down, down_bias)
