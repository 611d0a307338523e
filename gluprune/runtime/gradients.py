"""A GLU MLP and its gradients by PyTorch's operations: wherever kernels cannot run, and for gradients of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from gluprune.runtime.rounding import dequantize

# Weights of gate [I, H], up [I, H] and down [H, I]; their biases [I], [I], [H] or None; their scales, of the shapes of
# the biases, or None: only fp8 weights have scales, and are uint8.
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, *tuple[torch.Tensor | None, ...]]
Gradients = tuple[torch.Tensor | None, ...]


def eager_forward(x: torch.Tensor, operands: Operands, activation: str) -> torch.Tensor:
    """Return `down(act(gate(x)) * up(x))` for x `[..., H]`.

    Args:
        x: `[..., H]`.
        operands: Weights, biases and scales.
        activation: "silu" or "gelu_tanh".
    """
    gate, up, down, gate_bias, up_bias, down_bias, gate_scale, up_scale, down_scale = operands
    if gate_scale is not None and up_scale is not None and down_scale is not None:
        gate, up, down = dequantize(gate, gate_scale), dequantize(up, up_scale), dequantize(down, down_scale)
    hidden = activate(activation, F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
    return F.linear(hidden, down, down_bias)


def activate(name: str, gate: torch.Tensor) -> torch.Tensor:
    """Return the activation "silu" or "gelu_tanh" of `gate`."""
    return F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh")


def _activate_backward(name: str, grad: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    if name == "silu":
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(grad, gate)
        sigmoid = torch.sigmoid(gate)  # the fused operator has no derivative
        return grad * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")


def eager_gradients(
    grad: torch.Tensor, tensors: Sequence[torch.Tensor | None], activation: str, wanted: Sequence[bool]
) -> Gradients:
    """Return the gradients of `down(act(gate(x)) * up(x))`, differentiable themselves.

    Gate and up are computed again from x: no tensor of the intermediate width is stored between the passes.

    Args:
        grad: `[..., H]`, the gradient of the output.
        tensors: x `[..., H]`, the weights of gate and up `[I, H]` and of down `[H, I]`, the biases of gate and up `[I]`
            or None.
        activation: "silu" or "gelu_tanh".
        wanted: For each of these tensors, whether its gradient is computed.

    Returns:
        One gradient for each tensor, or None.
    """
    x, gate_weight, up_weight, down_weight, gate_bias, up_bias = tensors
    assert x is not None and gate_weight is not None and up_weight is not None and down_weight is not None
    gate, up = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
    activated = activate(activation, gate)
    grad_hidden = grad @ down_weight
    grad_gate = _activate_backward(activation, grad_hidden * up, gate)
    grad_up = grad_hidden * activated

    def weight_grad(grad_output: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return grad_output.reshape(-1, grad_output.shape[-1]).t() @ inputs.reshape(-1, inputs.shape[-1])

    return (
        grad_gate @ gate_weight + grad_up @ up_weight if wanted[0] else None,
        weight_grad(grad_gate, x) if wanted[1] else None,
        weight_grad(grad_up, x) if wanted[2] else None,
        weight_grad(grad, activated * up) if wanted[3] else None,
        bias_gradient(grad_gate) if wanted[4] else None,
        bias_gradient(grad_up) if wanted[5] else None,
    )


def bias_gradient(grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a bias `[N]` from that of what it was added to, `[..., N]`."""
    return grad.reshape(-1, grad.shape[-1]).sum(0)
