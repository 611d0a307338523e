"""Device functions that the kernels share: the wait for the previous kernel, activations, biases and the mask."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """With PDL (programmatic dependent launch): wait for the previous kernel, and let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def silu(x):
    """SiLU: x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    """GELU in its tanh approximation: 0.5 x (1 + tanh z) = x / (1 + exp(-2 z)).

    Nothing cancels in the second form, and an overflowing exp gives the limit.
    """
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
def activation_and_slope(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative, in float32.

    Both activations are x * sigmoid(k(x)), whose derivative is s + x * s * (1 - s) * k'(x) with s = sigmoid(k(x)).
    """
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu_tanh")
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        return x * s, s + x * (s * (1.0 - s))
    else:
        square = x * x
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * square * x)))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        return x * s, s + x * (s * (1.0 - s)) * slope  # zero first: a finite x must not overflow


@triton.jit
def along(values, TOKEN_AXIS: tl.constexpr):
    """`[BLOCK_N]` values with a token axis of size 1 inserted at TOKEN_AXIS; unchanged if that is None."""
    if TOKEN_AXIS is None:
        return values
    else:
        return tl.expand_dims(values, TOKEN_AXIS)


@triton.jit
def load_bias(bias, neurons, I):
    """Bias `[BLOCK_N]` of the neurons in float32, 0 from I on."""
    return tl.load(bias + neurons, mask=neurons < I, other=0.0).to(tl.float32)


@triton.jit
def biased_glu(gate, up, gate_bias, up_bias, neurons, I, ACTIVATION: tl.constexpr, TOKEN_AXIS: tl.constexpr):
    """act(gate + gate_bias) * (up + up_bias) in float32, and zero for neurons from I on.

    `neurons` `[BLOCK_N]` are those of gate and up, which have a token axis at TOKEN_AXIS unless it is None.
    """
    if gate_bias is not None:
        gate += along(load_bias(gate_bias, neurons, I), TOKEN_AXIS)
    if up_bias is not None:
        up += along(load_bias(up_bias, neurons, I), TOKEN_AXIS)
    return tl.where(along(neurons, TOKEN_AXIS) < I, glu(gate, up, ACTIVATION), 0.0)


@triton.jit
def scaled(values, scale, rows, count, TOKEN_AXIS: tl.constexpr):
    """`values` times the scales of their weight rows, which fp8 weights have; unchanged if `scale` is None.

    `rows` `[BLOCK_N]` are those of `values`, which have a token axis at TOKEN_AXIS unless it is None; `count` exist.
    """
    if scale is None:
        return values
    else:
        return values * along(load_bias(scale, rows, count), TOKEN_AXIS)
