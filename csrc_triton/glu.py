"""The forward pass of a GLU MLP on padded weights: `down(act(gate(x)) * up(x))`.

The intermediate size `I` may be any integer; the buffers are padded with zeros to `IP`, the next multiple of 128, which
is exact and keeps every weight load 16 bytes wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import launch
from .activations import ACTIVATIONS, plan_act_mul
from .down_decode import plan_down_gemv, plan_down_splitk
from .glu_decode import plan_gate_up_gemv, plan_gate_up_swap
from .glu_prefill import plan_gate_up_tile, plan_gate_up_tma
from .launch import GateUpGemv, GateUpSwap, GateUpTma, KernelCall, Launch, Plan


def glu_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    intermediate_size: int,
    activation: str = "silu",
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """GLU MLP (Shazeer 2020, eq. 6) of `x` `[M, H]`; returns a new `[M, H]` tensor in x's dtype.

    `down` `[H, IP]` is contiguous, IP the intermediate size I rounded up to 128, with columns I..IP zero. `gate_up` is
    `[2, IP, H]` with contiguous rows and the up half at least I rows after the gate half: the halves overlap in a
    packed weight, whose up rows follow the gate rows at once. What its rows I..IP hold does not matter. Biases are
    `[I]`, `[I]`, `[H]` or None. All are bfloat16, float16 or float32, of one dtype on one device. Sums are kept in
    float32 and are deterministic; float32 inputs are multiplied in full precision unless
    `torch.backends.cuda.matmul.allow_tf32`. `x` may have any strides. No autograd.

    `path` forces "gemv" (one token only), "decode", "small", "prefill" or "cublas"; None chooses by shape and device.
    With one token on sm_90 and later, the kernel launched just before must not be writing the weights: they are
    requested before it ends. Raises ValueError or TypeError on any other input.
    """
    biases = (gate_bias, up_bias, down_bias)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        return planned(x, gate_up, down, intermediate_size, activation, *biases, path).run()


def planned(x, gate_up, down, intermediate_size, activation, gate_bias, up_bias, down_bias, path) -> Plan:
    """What `glu_mlp` will run, for the same arguments; nothing is launched yet."""
    biases = (gate_bias, up_bias, down_bias)
    check(x, gate_up, down, intermediate_size, activation, *biases)
    M, H = x.shape
    sm = launch.compute_capability(x.device)
    if M == 0:
        if path is not None and path not in launch.PATHS:
            raise ValueError(f"path must be one of {', '.join(launch.PATHS)} or None, got {path!r}")
        return Plan(x.new_empty((0, H)), [])
    decision = launch.choose(M, H, down.shape[1], x.dtype, sm, path, launch.device_table(x.device))
    return plan_glu_mlp(x, gate_up, down, intermediate_size, activation, *biases, decision, sm)


def plan_glu_mlp(
    x, gate_up, down, intermediate_size, activation, gate_bias, up_bias, down_bias, decision: Launch, sm: int
) -> Plan:
    """The calls of `glu_mlp` for `M >= 1` tokens under `decision`: Triton kernels and cuBLAS products."""
    x = _aligned(x)
    config = decision.gate_up
    if config is None:
        h = plan_gate_up_matmul(x, gate_up)
        act = plan_act_mul(h.output, intermediate_size, activation, gate_bias, up_bias)
        hidden = Plan(act.output, h.calls + act.calls)
    else:
        args = (x, gate_up, intermediate_size, activation, gate_bias, up_bias, config)
        if isinstance(config, GateUpGemv):
            hidden = plan_gate_up_gemv(*args)
        elif isinstance(config, GateUpSwap):
            hidden = plan_gate_up_swap(*args)
        elif isinstance(config, GateUpTma):
            hidden = plan_gate_up_tma(*args, sm)
        else:
            hidden = plan_gate_up_tile(*args)
    if decision.down is None:
        y = plan_matmul(hidden.output, down, down_bias)
    elif isinstance(decision.down, launch.DownGemv):
        y = plan_down_gemv(hidden.output, down, down_bias, decision.down)
    else:
        y = plan_down_splitk(hidden.output, down, down_bias, decision.down)
    return Plan(y.output, hidden.calls + y.calls)


@dataclass(frozen=True)
class MatmulCall:
    """out = x @ weight.T (+ bias) by cuBLAS."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor

    @torch.no_grad()
    def run(self) -> None:
        if self.bias is None:
            torch.mm(self.x, self.weight.t(), out=self.out)
        else:
            torch.addmm(self.bias, self.x, self.weight.t(), out=self.out)


def plan_gate_up_matmul(x, gate_up) -> Plan:
    """`[M, H]` -> `[M, 2 * IP]`: in one product, or in two where the halves do not follow each other."""
    if gate_up.is_contiguous():
        return plan_matmul(x, gate_up.flatten(0, 1), None)
    h = torch.empty((x.shape[0], 2 * gate_up.shape[1]), dtype=x.dtype, device=x.device)
    return Plan(h, [MatmulCall(x, weight, None, out) for weight, out in zip(gate_up, h.chunk(2, dim=1))])


def plan_matmul(x, weight, bias) -> Plan:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    return Plan(out, [MatmulCall(x, weight, bias, out)])


def shipped_plans(sm: int, dtype: torch.dtype, H: int, I: int) -> list[tuple[str, int, KernelCall]]:
    """The kernel calls `(label, M, call)` of the heuristics on compute capability `sm`, for an M or two of each regime.

    Planned on meta tensors: no device, no memory. Forced paths are included where the chooser prefers cuBLAS.
    """
    IP = -(-I // launch.PAD) * launch.PAD
    gate_up = torch.empty((2, IP, H), dtype=dtype, device="meta")
    down = torch.empty((H, IP), dtype=dtype, device="meta")
    plans = []
    for M in (1, 2, 16, 32, 64, 128, 256, 2048):
        x = torch.empty((M, H), dtype=dtype, device="meta")
        paths = dict.fromkeys((launch.choose_path(M, H, IP, dtype, sm), launch.triton_path(M), "cublas"))
        for path in paths if sm >= 80 else ("cublas",):
            decision = launch.heuristic(path, M, H, IP, dtype, sm)
            plan = plan_glu_mlp(x, gate_up, down, I, "silu", None, None, None, decision, sm)
            kernels = [call for call in plan.calls if isinstance(call, KernelCall)]
            plans += [(f"{path}/{call.kernel.__name__}", M, call) for call in kernels]
    return plans


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` with contiguous rows that start at 16-byte boundaries where H allows it: itself, or a copy."""
    M, H = x.shape
    if M == 1 and x.stride(0) != H:
        x = x.as_strided((1, H), (H, x.stride(1)))  # the row stride of a single row means nothing
    plain = x.stride(1) == 1 or H == 1
    apart = x.stride(0) >= H
    on_boundary = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    if plain and apart and (on_boundary or not launch.rows_aligned(H, x.dtype)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def check(x, gate_up, down, intermediate_size, activation, gate_bias, up_bias, down_bias) -> None:
    """Raise what `glu_mlp` raises for these arguments."""
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x must be [M, H] with H >= 1, got {list(x.shape)}")
    if intermediate_size < 1:
        raise ValueError(f"intermediate_size must be at least 1, got {intermediate_size}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dtype not in launch.DTYPES.values():
        raise TypeError(f"x must be one of {', '.join(launch.DTYPES)}, got {x.dtype}")
    I, H = intermediate_size, x.shape[1]
    IP = -(-I // launch.PAD) * launch.PAD
    shapes = {
        "gate_up": (gate_up, (2, IP, H)),
        "down": (down, (H, IP)),
        "gate_bias": (gate_bias, (I,)),
        "up_bias": (up_bias, (I,)),
        "down_bias": (down_bias, (H,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} (H {H}, intermediate size {I}), got {list(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise TypeError(f"{name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}")
        plain = tensor.is_contiguous() if name != "gate_up" else _has_halves(tensor, I)
        if not plain or tensor.data_ptr() % 16 and name in ("gate_up", "down"):
            raise ValueError(f"{name} must be contiguous from a 16-byte boundary, got strides {tensor.stride()}")


def _has_halves(gate_up: torch.Tensor, intermediate_size: int) -> bool:
    """Whether both halves are contiguous and whole rows apart, with room for the gate rows in between."""
    H = gate_up.shape[2]
    apart = gate_up.stride(0)
    return gate_up[0].is_contiguous() and apart % H == 0 and apart >= intermediate_size * H
