"""Random GLU MLPs, their float64 reference, and the error measure of the kernel tests."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from csrc_triton.glu.weights import GluWeights
from csrc_triton.layout import FP8, padded_width

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LAYOUTS = ("contiguous", "aligned rows", "unaligned rows", "unaligned start", "transposed", "apart", "expanded")


@dataclasses.dataclass
class Case:
    x: torch.Tensor
    weights: GluWeights


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` (of its first row, if expanded) with other strides, and with unrelated values between the rows.

    The unrelated values are large, not NaN: oneDNN's half-precision product on the CPU reads past an unaligned width
    and multiplies by zero.
    """
    M, H = x.shape
    foreign = 100.0
    if layout in ("aligned rows", "unaligned rows"):
        wide = x.new_full((M, H // 8 * 8 + (16 if layout == "aligned rows" else 9)), foreign)
        wide[:, :H] = x
        return wide[:, :H]
    if layout == "unaligned start":
        flat = x.new_full((M * H + 1,), foreign)
        flat[1:] = x.flatten()
        return flat[1:].view(M, H)
    if layout == "apart":
        return torch.stack((x, torch.full_like(x, foreign)), dim=2).flatten(1)[:, ::2]
    if layout == "transposed":
        return x.t().contiguous().t()
    return x[:1].expand(M, H) if layout == "expanded" else x


def make_case(
    seed,
    M,
    H,
    I,
    dtype=torch.float32,
    *,
    activation="silu",
    biases="",
    layout="contiguous",
    device="cpu",
    packed=False,
    fp8=False,
) -> Case:
    """`biases` holds any of the letters g, u, d. Padded columns of down are zero, as the kernels require.

    Padded rows of gate_up are NaN: nothing may depend on them. If `packed`, the up rows directly follow the gate rows.
    If `fp8`, the weights are float8_e4m3fn, with a random scale for each row.
    """
    generator = torch.Generator().manual_seed(seed)
    IP = padded_width(I)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    apart = I if packed else IP
    rows = torch.full((apart + IP, H), float("nan"), dtype=dtype, device=device)
    gate_up = rows.as_strided((2, IP, H), (apart * H, H, 1))
    gate_up[:, :I] = normal(2, I, H, scale=H**-0.5)
    down = torch.zeros((H, IP), dtype=dtype, device=device)
    down[:, :I] = normal(H, I, scale=I**-0.5)
    x = lay_out(normal(M, H), layout)
    sizes = {"g": I, "u": I, "d": H}
    gate_bias, up_bias, down_bias = (normal(sizes[name]) if name in biases else None for name in "gud")
    weights = GluWeights(gate_up, down, I, activation, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias)
    return Case(x, with_fp8(weights, generator) if fp8 else weights)


def with_fp8(weights: GluWeights, generator: torch.Generator) -> GluWeights:
    """The weights rounded to fp8: each row becomes a random power of two, and what is left after dividing by it.

    The powers range widely: some rows hold little but the largest fp8 values, and some little but subnormal ones.
    """
    I, distance = weights.intermediate_size, weights.up_row
    H, IP = weights.down.shape
    dtype, device = weights.down.dtype, weights.down.device
    scales = [(2.0 ** torch.randint(-12, 5, (n,), generator=generator)).to(dtype).to(device) for n in (I, I, H)]
    rows = torch.full((distance + IP, H), 127, dtype=torch.uint8, device=device).view(FP8)  # NaN
    gate_up = rows.as_strided((2, IP, H), (distance * H, H, 1))
    for half, old, scale in zip(gate_up.view(torch.uint8), weights.gate_up, scales):
        half[:I] = (old[:I].float() / scale[:, None]).to(FP8).view(torch.uint8)
    down = (weights.down.float() / scales[2][:, None]).to(FP8)
    names = ("gate_scale", "up_scale", "down_scale")
    return dataclasses.replace(weights, gate_up=gate_up, down=down, **dict(zip(names, scales)))


def apart(weights: GluWeights) -> GluWeights:
    """The same weights with gate and up in memory of their own, without padding."""
    gate, up = (half[: weights.intermediate_size].clone() for half in weights.gate_up)
    return dataclasses.replace(weights, gate_up=gate[None], up=up)


def _doubles(case: Case):
    weights, I = case.weights, case.weights.intermediate_size
    zero = torch.zeros((), dtype=torch.float64, device=case.x.device)
    biases = [zero if b is None else b.double() for b in (weights.gate_bias, weights.up_bias, weights.down_bias)]
    gate, up, down = (w[:I].double() for w in (*weights.gate_up, weights.down.t()))
    if weights.is_fp8:
        scales = weights.gate_scale, weights.up_scale, weights.down_scale
        gate, up = (w * scale.double()[:, None] for w, scale in zip((gate, up), scales))
        down = down * scales[2].double()
    return case.x.double(), gate, up, down.t(), biases


def hidden_truth(case: Case) -> torch.Tensor:
    """act(gate(x)) * up(x), float64 `[M, I]`."""
    x, gate, up, _, (gate_bias, up_bias, _) = _doubles(case)
    g, u = x @ gate.t() + gate_bias, x @ up.t() + up_bias
    return (F.silu(g) if case.weights.activation == "silu" else F.gelu(g, approximate="tanh")) * u


def truth(case: Case) -> torch.Tensor:
    """The output of the MLP, float64 `[M, H]`."""
    _, _, _, down, (_, _, down_bias) = _doubles(case)
    return hidden_truth(case) @ down.t() + down_bias


def magnitude(case: Case, hidden: bool = False) -> torch.Tensor:
    """Root sum of squares of the terms that make up each element: its usual size if no terms happen to cancel."""
    x, gate, up, down, biases = _doubles(case)
    x, gate, up, down, gate_bias, up_bias, down_bias = (v**2 for v in (x, gate, up, down, *biases))
    a = (x @ gate.t() + gate_bias) * (x @ up.t() + up_bias)
    return (a if hidden else a @ down.t() + down_bias).sqrt()


def error(y: torch.Tensor, case: Case) -> float:
    """Largest absolute error over the largest absolute value or magnitude; NaN if any element is."""
    return _relative(y, truth(case), magnitude(case))


def _relative(y: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> float:
    if torch.equal(y.double(), expected):  # also where nothing is expected, or nothing but zeros
        return 0.0
    # Below the smallest normal number, what a dtype can represent is a fixed distance apart.
    largest = torch.maximum(expected.abs(), size).max().clamp_min(torch.finfo(y.dtype).tiny)
    return ((y.double() - expected).abs().max() / largest).item()


def hidden_error(a: torch.Tensor, case: Case) -> float:
    """`error` for the activations `[M, IP]`, whose columns from I on must be exactly zero."""
    I = case.weights.intermediate_size
    assert a[:, I:].eq(0).all(), "columns from I on must be zero"
    return _relative(a[:, :I], hidden_truth(case), magnitude(case, hidden=True))
