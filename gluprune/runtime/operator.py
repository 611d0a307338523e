"""The GLU MLP as one operator, `torch.ops.gluprune.glu_mlp`; the only module of gluprune that knows csrc_triton.

Opaque to torch.compile and torch.export, differentiable, usable on any device: where the kernels cannot run, or the
weights are not in the aligned layout of `gluprune.runtime.aligned`, it does PyTorch's own operations in the eager order.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F

from gluprune.runtime.aligned import padded_buffers

ACTIVATIONS = ("silu", "gelu_tanh")
BACKENDS = ("auto", "triton", "cublas", "torch")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown backend, or one that this machine can run nowhere."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: allowed are {', '.join(BACKENDS)}")
    if backend in ("triton", "cublas") and not (HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)):
        raise ValueError(
            f"backend {backend!r} needs Triton and a CUDA device (for tests: TRITON_INTERPRET=1); use 'auto' or 'torch'"
        )


def uses_kernels(backend: str, device: torch.device) -> bool:
    """Whether `backend` runs kernels for tensors on `device`.

    CUDA does unless PyTorch is asked for. The CPU does only when a kernel backend is asked for in Triton's interpreter.
    """
    if backend == "torch" or not HAS_TRITON:
        return False
    return device.type == "cuda" or (device.type == "cpu" and backend != "auto" and INTERPRETED)


def _activation(name: str, gate: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh")


def _activation_backward(name: str, grad: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    if name == "silu":
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(grad, gate)
        sigmoid = torch.sigmoid(gate)  # the fused operator has no derivative of its own
        return grad * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")


def run_kernels(
    x: torch.Tensor,
    up_row: int,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    backend: str,
) -> torch.Tensor:
    """What `glu_mlp` computes, for weights in the layout of `gluprune.runtime.aligned`, past PyTorch's dispatcher.

    The dispatcher costs more time on the host than an MLP takes on the GPU for one token; so do planning and Triton's own
    look-ups, which is why the launches for few tokens are recorded at the first call and replayed from then on. No
    autograd; `up_row` is what `storage.first_up_row` says. A replay checks nothing: the caller knows that the operands fit.
    """
    glu, launch, recording = _kernels()
    H = x.shape[-1]
    M = x.numel() // H
    path = None if backend == "auto" else "cublas" if backend == "cublas" else launch.triton_path(M)
    if not 0 < M <= RECORDED_TOKENS or not x.is_contiguous():
        buffers = padded_buffers(gate_weight, up_weight, down_weight)
        y = glu.glu_mlp(
            x.reshape(-1, H), *buffers, down_weight.shape[1], activation, gate_bias, up_bias, down_bias, path
        )
        return y.view(x.shape)
    inputs = (x, gate_weight, down_weight, gate_bias, up_bias, down_bias)
    alignments = [None if tensor is None else tensor.data_ptr() % 16 for tensor in inputs]
    shapes = M, H, down_weight.shape[1], up_row
    key = (*shapes, *alignments, x.dtype, x.device, activation, path, launch.input_precision(x.dtype))
    recorded = _recordings.get(key, _NOT_TRIED)
    if isinstance(recorded, recording.Recording):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
            recorded.run(inputs, y)
        return y
    rows, biases = x.view(M, H), (gate_bias, up_bias, down_bias)
    inputs = (rows, *padded_buffers(gate_weight, up_weight, down_weight), *biases)
    plan = glu.planned(*inputs[:3], down_weight.shape[1], activation, *biases, path)
    with torch.cuda.device_of(x):
        y = plan.run()
        if recorded is _NOT_TRIED and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            _recordings[key] = recording.record(plan, inputs)  # None where it cannot be
    return y.view(x.shape)


RECORDED_TOKENS = 128  # above, kernels take longer than planning
_NOT_TRIED = object()
_recordings: dict[tuple[object, ...], Any] = {}


@functools.cache
def _kernels():
    from csrc_triton import glu, launch, recording  # they import Triton

    return glu, launch, recording


def is_observed(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd or a dispatch mode has to see an operation on these tensors."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    return torch._C._len_torch_dispatch_stack() > 0


@torch.library.custom_op("gluprune::glu_mlp", mutates_args=())
def glu_mlp(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    backend: str,
) -> torch.Tensor:
    """`down(act(gate(x)) * up(x))`, the GLU MLP of Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.

    Args:
        x: `[..., H]`; gate_weight, up_weight: `[I, H]`; down_weight: `[H, I]`; biases: `[I]`, `[I]`, `[H]` or None; of
            one floating dtype on one device. Kernels take bf16, fp16 and fp32.
        activation: "silu" or "gelu_tanh".
        backend: "auto" (on CUDA the faster one), "triton", "cublas" or "torch".

    Returns:
        A new `[..., H]` tensor of x's dtype.

    Raises:
        ValueError: unknown activation or backend.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: allowed are {', '.join(ACTIVATIONS)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: allowed are {', '.join(BACKENDS)}")
    buffers = None
    if uses_kernels(backend, x.device) and x.dtype in KERNEL_DTYPES:
        buffers = padded_buffers(gate_weight, up_weight, down_weight)
    if buffers is None:
        hidden = _activation(activation, F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)
        return F.linear(hidden, down_weight, down_bias)

    glu, launch, _ = _kernels()
    biases = gate_bias, up_bias, down_bias
    glu.check(x.reshape(-1, x.shape[-1]), *buffers, gate_weight.shape[0], activation, *biases)
    row = launch.first_up_row(buffers[0])
    return run_kernels(x, row, gate_weight, up_weight, down_weight, *biases, activation, backend)


@glu_mlp.register_fake
def _(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, activation, backend):
    return x.new_empty((*x.shape[:-1], down_weight.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    """The eager gradients; gate and up are computed again from x: nothing of width I is kept for the backward pass."""
    x, gate_weight, up_weight, down_weight, gate_bias, up_bias, _ = ctx.saved_tensors
    needs = ctx.needs_input_grad
    gate, up = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
    activated = _activation(ctx.activation, gate)
    grad_hidden = grad @ down_weight
    grad_gate = _activation_backward(ctx.activation, grad_hidden * up, gate)
    grad_up = grad_hidden * activated

    def weight_grad(grad_output, inputs):
        return grad_output.reshape(-1, grad_output.shape[-1]).t() @ inputs.reshape(-1, inputs.shape[-1])

    def bias_grad(grad_output):
        return grad_output.reshape(-1, grad_output.shape[-1]).sum(0)

    return (
        grad_gate @ gate_weight + grad_up @ up_weight if needs[0] else None,
        weight_grad(grad_gate, x) if needs[1] else None,
        weight_grad(grad_up, x) if needs[2] else None,
        weight_grad(grad, activated * up) if needs[3] else None,
        bias_grad(grad_gate) if needs[4] else None,
        bias_grad(grad_up) if needs[5] else None,
        bias_grad(grad) if needs[6] else None,
        None,
        None,
    )


glu_mlp.register_autograd(_backward, setup_context=_setup_context)


def neuron_statistics(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor):
    """Statistics of every neuron of one layer by one kernel launch, which reads each weight once.

    Args:
        gate, up: `[I, H]`; down: `[H, I]`; bf16, fp16 or fp32, on CUDA (in Triton's interpreter: on the CPU).

    Returns:
        `csrc_triton.neuron_scores.NeuronStatistics`, float32 `[I]` tensors.
    """
    from csrc_triton.neuron_scores import neuron_scores

    return neuron_scores(gate, up, down)
