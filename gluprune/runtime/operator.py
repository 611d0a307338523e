"""The GLU MLP as one operator, `torch.ops.gluprune.glu_mlp`; the only module of the runtime that imports csrc_triton.

Opaque to torch.compile and torch.export, differentiable, usable on any device: where the kernels cannot run, or the
weights are not in the layout of `csrc_triton.layout`, it runs PyTorch's own operations in the eager order.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from csrc_triton import layout
from csrc_triton.layout import ACTIVATIONS
from gluprune.runtime.gradients import Operands, bias_gradient, eager_forward, eager_gradients
from gluprune.runtime.rounding import FP8, NO_GRADIENT

if TYPE_CHECKING:
    from csrc_triton.glu.weights import GluWeights
    from csrc_triton.launch.replay import Replay

BACKENDS = ("auto", "triton", "cublas", "torch")
KERNEL_DTYPES = tuple(layout.DTYPES.values())
Buffers = tuple[torch.Tensor, torch.Tensor]  # gate_up [2, IP, H], or gate alone [1, I, H]; down [H, IP]

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend, or one that cannot run on this machine."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend in ("triton", "cublas") and not (HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)):
        raise ValueError(
            f"backend {backend!r} needs Triton and a CUDA device (for tests: TRITON_INTERPRET=1); use 'auto' or 'torch'"
        )


def uses_kernels(backend: str, device: torch.device) -> bool:
    """Return whether `backend` runs kernels for tensors on `device`.

    CUDA does unless the backend is PyTorch. The CPU does only for a kernel backend in Triton's interpreter.
    """
    if backend == "torch" or not HAS_TRITON:
        return False
    return device.type == "cuda" or (device.type == "cpu" and backend != "auto" and INTERPRETED)


def _runs_kernels(backend: str, x: torch.Tensor) -> bool:
    return uses_kernels(backend, x.device) and x.dtype in KERNEL_DTYPES


def run_kernels(x: torch.Tensor, up_row: int, operands: Operands, activation: str, backend: str) -> torch.Tensor:
    """Compute `glu_mlp` for weights in the layout of `csrc_triton.layout`, without PyTorch's dispatcher and autograd.

    For few tokens the dispatcher costs more time on the host than the MLP takes on the GPU; so do planning and Triton's
    look-ups, which is why launches are kept on the first call and replayed afterwards. A replay checks nothing: the
    caller must ensure that the operands fit.

    Args:
        x: `[..., H]`.
        up_row: the result of `csrc_triton.layout.first_up_row` for the weights.
        operands: weights, biases and scales.
        activation: "silu" or "gelu_tanh".
        backend: "auto", "triton" or "cublas".

    Returns:
        A new `[..., H]` tensor of x's dtype.
    """
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
        replay = find_replay(x, up_row, operands, activation, backend)
        if replay is not None:
            return replay.run(x, replayed(operands))
        H = x.shape[-1]
        weights = _weights(layout.padded_buffers(*operands[:3]), operands, activation)
        forward, *_ = _kernels()
        return forward.glu_mlp(x.reshape(-1, H), weights, path=_path(x.numel() // H, backend)).view(x.shape)


def find_replay(x: torch.Tensor, up_row: int, operands: Operands, activation: str, backend: str) -> Replay | None:
    """Return the replay of `run_kernels` for tensors such as these, recorded by running it if there is none yet.

    Returns None if there can be none, or none now because a CUDA graph is captured. Call it with x's device as the
    current one.
    """
    H = x.shape[-1]
    M = x.numel() // H
    if M == 0 or not x.is_contiguous():
        return None
    forward, _, device, replay = _kernels()
    path = _path(M, backend)
    given = replayed(operands)
    alignments = [None if tensor is None else tensor.data_ptr() % 16 for tensor in (x, *given)]
    shapes = M, H, given[1].shape[1], up_row
    key = (*shapes, *alignments, x.dtype, x.device, activation, path, device.input_precision(x.dtype))

    def record() -> Replay | None:
        rows, weights = x.view(M, H), _weights(layout.padded_buffers(*operands[:3]), operands, activation)
        plan = forward.plan_checked(rows, weights, path=path)
        plan.run()
        return replay.make_replay(plan, rows, (weights.gate_up, weights.down, *given[2:]))

    return _kept(key, x, record)


def replayed(operands: Operands) -> tuple[torch.Tensor, torch.Tensor, *tuple[torch.Tensor | None, ...]]:
    """Return what a replay of a GLU MLP takes: gate (in whose buffer up is, too) and down, then biases and scales."""
    gate, _, down, *others = operands
    if others[-1] is not None:
        gate, down = gate.view(FP8), down.view(FP8)
    return gate, down, *others


def _kept(key: tuple[object, ...], x: torch.Tensor, record: Callable[[], Replay | None]) -> Replay | None:
    """Return the replay of a key, recorded if there is none yet; None while a CUDA graph is captured on x's device."""
    if key in _replays:
        return _replays[key]
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    replay = record()
    with _replays_lock:
        if len(_replays) >= MOST_REPLAYS:
            del _replays[next(iter(_replays))]
        _replays[key] = replay
    return replay


def find_norm_replay(x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: str) -> Replay | None:
    """Return the replay of an RMSNorm of tensors such as these, recorded by running it if there is none yet.

    Args:
        x: `[..., H]`, contiguous, of the dtype and device of `weight`, which is the current device.
        weight: `[H]`.
        eps: added to the mean square.
        rounding: see `csrc_triton.norm`.

    Returns:
        None if there can be no replay, or none now because a CUDA graph is captured.
    """
    if x.numel() == 0:
        return None
    H = x.shape[-1]
    key = ("norm", x.numel() // H, H, x.data_ptr() % 16, weight.data_ptr() % 16, x.dtype, x.device, eps, rounding)

    def record() -> Replay | None:
        _, _, _, replay = _kernels()
        rows = x.view(-1, H)
        plan = _norm().plan_rms_norm(rows, weight, eps, rounding)
        plan.run()
        return replay.make_replay(plan, rows, (weight, *[None] * 7))

    return _kept(key, x, record)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: str) -> torch.Tensor:
    """Return `csrc_triton.rms_norm` of contiguous tokens `[..., H]`."""
    return _norm().rms_norm(x, weight, eps, rounding)


MOST_REPLAYS = 1024  # of a few kilobytes each; the oldest goes first
_replays: dict[tuple[object, ...], Replay | None] = {}
_replays_lock = threading.Lock()


def input_precision(dtype: torch.dtype) -> str:
    """Return the precision that kernels multiply in, which PyTorch's settings decide for float32."""
    _, _, device, _ = _kernels()
    return device.input_precision(dtype)


def _path(M: int, backend: str) -> str | None:
    """Return the path that a backend forces for `M` tokens, or None."""
    return None if backend == "auto" else "cublas" if backend == "cublas" else _kernels()[1].triton_path(M)


def _weights(buffers: Buffers | None, operands: Operands, activation: str) -> GluWeights:
    """Return the weights for the kernels: the buffers that the operands are views of, and the operands' biases."""
    if buffers is None:
        raise ValueError("the weights are not in the layout of csrc_triton.layout")
    forward, *_ = _kernels()
    gate, up, _, gate_bias, up_bias, down_bias, gate_scale, up_scale, down_scale = operands
    gate_up, down = buffers if down_scale is None else (buffer.view(FP8) for buffer in buffers)
    return forward.GluWeights(
        gate_up,
        down,
        intermediate_size=gate.shape[0],
        activation=activation,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        gate_scale=gate_scale,
        up_scale=up_scale,
        down_scale=down_scale,
        up=None if len(gate_up) == 2 else up.detach(),
    )


@functools.cache
def _kernels():
    from csrc_triton.glu import forward  # imports Triton
    from csrc_triton.launch import chooser, device, replay

    return forward, chooser, device, replay


@functools.cache
def _glu_backward():
    from csrc_triton.glu import backward  # imports Triton

    return backward


@functools.cache
def _norm():
    from csrc_triton import norm  # imports Triton

    return norm


def is_observed(*tensors: torch.Tensor | None) -> bool:
    """Return whether autograd or a dispatch mode must see an operation on these tensors."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    return torch._C._len_torch_dispatch_stack() > 0


@torch.library.custom_op("gluprune::glu_mlp", mutates_args=())
def glu_mlp(  # noqa: PLR0917 - the schema of an operator is flat
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    backend: str,
    gate_scale: torch.Tensor | None = None,
    up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a GLU MLP: `down(act(gate(x)) * up(x))` (Shazeer, "GLU Variants Improve Transformer", 2020, equation 6).

    Kernels run for bf16, fp16 and fp32 weights in the layout of `csrc_triton.layout`, and one kernel between cuBLAS's
    products for weights that are contiguous and apart; PyTorch's operations otherwise.

    Args:
        x: `[..., H]`, of a floating dtype; all other tensors have its dtype and device, but fp8 weights are uint8.
        gate_weight: `[I, H]`.
        up_weight: `[I, H]`.
        down_weight: `[H, I]`.
        gate_bias: `[I]` or None.
        up_bias: `[I]` or None.
        down_bias: `[H]` or None.
        activation: "silu" or "gelu_tanh".
        backend: "auto" (on CUDA the faster one), "triton", "cublas" or "torch".
        gate_scale: `[I]`, the scales of the rows of fp8 weights, which have no gradient; or None.
        up_scale: `[I]` or None.
        down_scale: `[H]` or None.

    Returns:
        A new `[..., H]` tensor of x's dtype.

    Raises:
        ValueError: an unknown activation or backend.

    Example:
        >>> import torch
        >>> from gluprune.runtime.operator import glu_mlp
        >>> x, gate, up, down = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5, 8), torch.randn(8, 5)
        >>> glu_mlp(x, gate, up, down, None, None, None, "silu", "auto").shape
        torch.Size([3, 8])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    scales = gate_scale, up_scale, down_scale
    operands = gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, *scales
    buffers = layout.usable_buffers(gate_weight, up_weight, down_weight) if _runs_kernels(backend, x) else None
    if buffers is None:
        return eager_forward(x, operands, activation)
    weights = _weights(buffers, operands, activation)
    rows = x.reshape(-1, x.shape[-1])
    weights.check(rows)
    are_apart = weights.up is not None
    if not are_apart and layout.is_padded_down(down_weight):
        return run_kernels(x, weights.up_row, operands, activation, backend)
    forward, *_ = _kernels()
    path = "cublas" if are_apart else _path(rows.shape[0], backend)
    return forward.glu_mlp(rows, weights, path=path).view(x.shape)


@glu_mlp.register_fake
def _(x, gate_weight, up_weight, down_weight, *others):
    return x.new_empty((*x.shape[:-1], down_weight.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.backend, _, _, scale = inputs
    ctx.is_fp8 = scale is not None
    ctx.save_for_backward(*tensors)


@torch.library.custom_op("gluprune::glu_mlp_backward", mutates_args=())
def glu_mlp_backward(  # noqa: PLR0917 - the schema of an operator is flat
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    activation: str,
    wanted: list[bool],
) -> list[torch.Tensor]:
    """Compute gradients of `glu_mlp` where kernels can run, without autograd.

    Args:
        grad: `[..., H]`, the gradient of the output.
        x: As for `glu_mlp`, and all other tensors.
        gate_weight: `[I, H]`.
        up_weight: `[I, H]`.
        down_weight: `[H, I]`.
        gate_bias: `[I]` or None.
        up_bias: `[I]` or None.
        activation: "silu" or "gelu_tanh".
        wanted: Whether to compute each of the gradients below.

    Returns:
        The wanted of the gradients of x `[..., H]`, of gate and up `[2, I, H]`, of down `[H, I]`, and of the biases of
        gate and up `[2, I]`.
    """
    gate_up = layout.usable_gate_up(gate_weight, up_weight)
    if gate_up is None or x.numel() == 0:
        each = wanted[0], wanted[1], wanted[1], wanted[2], wanted[3], wanted[3]
        tensors = x, gate_weight, up_weight, down_weight, gate_bias, up_bias
        of_x, gate, up, down, gate_bias, up_bias = eager_gradients(grad, tensors, activation, each)
        pair = None if gate is None or up is None else torch.stack((gate, up))
        biases = None if gate_bias is None or up_bias is None else torch.stack((gate_bias, up_bias))
        return [gradient for gradient in (of_x, pair, down, biases) if gradient is not None]
    buffers = layout.padded_buffers(gate_weight, up_weight, down_weight) or (gate_up, down_weight)
    operands = gate_weight, up_weight, down_weight, gate_bias, up_bias, None, None, None, None
    weights = _weights(buffers, operands, activation)
    backward, H = _glu_backward(), x.shape[-1]
    names = [name for name, is_wanted in zip(backward.GluGradients._fields, wanted, strict=True) if is_wanted]
    found = backward.glu_mlp_backward(grad.reshape(-1, H), x.reshape(-1, H), weights, names)
    if found.x is not None:
        found = found._replace(x=found.x.view(x.shape))
    return [gradient for gradient in found if gradient is not None]


@glu_mlp_backward.register_fake
def _(grad, x, gate_weight, up_weight, down_weight, *others):
    *_, wanted = others
    shapes = x.shape, (2, *gate_weight.shape), down_weight.shape, (2, gate_weight.shape[0])
    return [x.new_empty(shape) for shape, is_wanted in zip(shapes, wanted, strict=True) if is_wanted]


def _backward(ctx, grad):
    """Return the gradients by kernels, or by PyTorch's operations: where kernels cannot run, and to differentiate."""
    if ctx.is_fp8:
        raise RuntimeError(NO_GRADIENT)
    *tensors, _ = ctx.saved_tensors
    x, needs = tensors[0], ctx.needs_input_grad
    if torch.is_grad_enabled() or not _runs_kernels(ctx.backend, x):
        found = eager_gradients(grad, tensors, ctx.activation, needs)
    else:
        wanted = [needs[0], needs[1] or needs[2], needs[3], needs[4] or needs[5]]
        gradients = iter(glu_mlp_backward(grad, *tensors, ctx.activation, wanted) if any(wanted) else ())
        of_x, pair, down, biases = (next(gradients) if is_wanted else None for is_wanted in wanted)
        gate, up = (None, None) if pair is None else pair.unbind()
        gate_bias, up_bias = (None, None) if biases is None else biases.unbind()
        every = of_x, gate, up, down, gate_bias, up_bias
        found = [gradient if is_needed else None for gradient, is_needed in zip(every, needs, strict=False)]
    return *found, bias_gradient(grad) if needs[6] else None, *[None] * 5


glu_mlp.register_autograd(_backward, setup_context=_setup_context)
