"""The forward pass of a GLU MLP on padded weights: `down(act(gate(x)) * up(x))`.

The intermediate size `I` may be any integer; the buffers are padded with zeros to `IP`, the next multiple of 128, which
is exact and keeps every weight load 16 bytes wide.
"""

from __future__ import annotations

import torch

from csrc_triton.glu.act_mul import plan_act_mul
from csrc_triton.glu.dequantize import plan_dequantize
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch.call import KernelCall, MatmulCall, Plan
from csrc_triton.launch.chooser import choose, choose_path, heuristic, triton_path
from csrc_triton.launch.configs import Launch, Problem
from csrc_triton.launch.paths import FP8_PATHS, check_path
from csrc_triton.launch.tables import device_table
from csrc_triton.layout import FP8, padded_width, rows_aligned


def glu_mlp(x: torch.Tensor, weights: GluWeights, *, path: str | None = None) -> torch.Tensor:
    """Compute a GLU MLP (Shazeer 2020, eq. 6). No autograd.

    Sums are kept in float32 and are deterministic; float32 inputs are multiplied in full precision unless
    `torch.backends.cuda.matmul.allow_tf32`. With one token on sm_90 and later, the previous kernel must not be writing
    the weights: they are requested before it ends.

    Args:
        x: `[M, H]`, with any strides; bfloat16, float16 or float32, like the weights (unless those are fp8) and on
            their device.
        weights: the weights in the padded layout.
        path: forces "gemv" (one token only), "decode", "small", "prefill" or "cublas"; None chooses by problem, which
            is "cublas" where gate and up are not in one buffer.

    Returns:
        A new `[M, H]` tensor in x's dtype.

    Raises:
        ValueError: wrong shapes or strides, an unknown activation or path.
        TypeError: an unsupported dtype, or tensors of different dtypes or devices.

    Example:
        >>> import torch
        >>> from csrc_triton import GluWeights, glu_mlp
        >>> I, H = 5735, 2048  # the padded width is 5760
        >>> gate_up = torch.randn(2, 5760, H).bfloat16().cuda()
        >>> down = torch.zeros(H, 5760).bfloat16().cuda()
        >>> down[:, :I].normal_()
        >>> y = glu_mlp(torch.randn(1, H).bfloat16().cuda(), GluWeights(gate_up, down, I))
    """
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
        return plan_checked(x, weights, path=path).run()


def plan_checked(x: torch.Tensor, weights: GluWeights, *, path: str | None = None) -> Plan:
    """Check the arguments of `glu_mlp`, choose a launch, and return the plan. Nothing is launched."""
    weights.check(x)
    check_path(path)
    if x.shape[0] == 0:
        return Plan(x.new_empty((0, x.shape[1])), [])
    if weights.up is not None:
        if path not in (None, "cublas"):
            raise ValueError(f"path {path!r} needs gate and up in one buffer; allowed: 'cublas'")
        path = "cublas"
    problem = weights.problem(x)
    return plan(x, weights, choose(problem, path, device_table(x.device)), problem)


def plan(x: torch.Tensor, weights: GluWeights, launch: Launch, problem: Problem | None = None) -> Plan:
    """Return the calls of `glu_mlp` for at least one token under `launch`: Triton kernels and cuBLAS products.

    Args:
        x: `[M, H]`.
        weights: the weights, unchecked.
        launch: valid for the problem.
        problem: the problem of these arguments; None computes it for the device of `x`.
    """
    problem = problem or weights.problem(x)
    x = _aligned(x)
    if weights.is_fp8 and launch.path not in FP8_PATHS:
        weights, calls = plan_dequantize(weights)
        following = plan(x, weights, launch, problem._replace(fp8=False))
        return Plan(following.output, calls + following.calls)
    gate_up, down = launch.gate_up, launch.down
    hidden = plan_gate_up_cublas(x, weights) if gate_up is None else gate_up.plan(x, weights, problem)
    a = hidden.output
    return hidden.then(plan_down_cublas(a, weights) if down is None else down.plan(a, weights, problem))


def plan_gate_up_cublas(x: torch.Tensor, weights: GluWeights) -> Plan:
    """Plan `[M, H]` -> `[M, IP]` as a cuBLAS product and a kernel for the activation."""
    product = plan_gate_up_matmul(x, weights)
    return product.then(plan_act_mul(product.output, weights))


def plan_down_cublas(a: torch.Tensor, weights: GluWeights) -> Plan:
    """Plan `[M, IP]` -> `[M, H]` as a cuBLAS product over the padded width."""
    return plan_matmul(a, weights.down, weights.down_bias)


def plan_gate_up_matmul(x: torch.Tensor, weights: GluWeights) -> Plan:
    """Plan `[M, H]` -> `[M, 2 * IP]`: one product, or two where gate and up are not adjacent.

    Where they are not in one buffer, the columns of the padding are left as they are.
    """
    if weights.up is None and weights.gate_up.is_contiguous():
        return plan_matmul(x, weights.gate_up.flatten(0, 1), None)
    h = torch.empty((x.shape[0], 2 * padded_width(weights.intermediate_size)), dtype=x.dtype, device=x.device)
    halves = zip(weights.halves, h.chunk(2, dim=1), strict=True)
    return Plan(h, [MatmulCall(x, weight, None, out[:, : weight.shape[0]]) for weight, out in halves])


def plan_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Plan:
    """Plan `x @ weight.T (+ bias)` by cuBLAS."""
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    return Plan(out, [MatmulCall(x, weight, bias, out)])


def shipped_plans(
    sm: int, dtype: torch.dtype, H: int, I: int, *, fp8: bool = False
) -> list[tuple[str, int, KernelCall]]:
    """Return the kernel calls `(label, M, call)` of the heuristics on a chip, for one or two M of each regime.

    Planned on meta tensors: no device, no memory. Forced paths are included where the chooser prefers cuBLAS.

    Args:
        sm: compute capability times ten.
        dtype: of weights and tokens.
        H: hidden size.
        I: intermediate size.
        fp8: whether the weights are fp8; then only the launches that read fp8 weights are returned.
    """
    weights = meta_weights(H, I, dtype, fp8=fp8)
    plans = []
    if fp8:
        plans = [("dequantize/dequantize_kernel", 2048, call) for call in plan_dequantize(weights)[1]]
    for M in (1, 2, 16, 32, 64, 128) if fp8 else (1, 2, 16, 32, 64, 128, 256, 2048):
        x = torch.empty((M, H), dtype=dtype, device="meta")
        problem = weights.problem(x, sm)
        paths = dict.fromkeys((choose_path(problem), triton_path(M), *(() if fp8 else ("cublas",))))
        for path in paths if sm >= 80 else ("cublas",):
            calls = plan(x, weights, heuristic(path, problem), problem).calls
            kernels = [call for call in calls if isinstance(call, KernelCall)]
            plans += [(f"{path}/{call.kernel.__name__}", M, call) for call in kernels]
    return plans


def meta_weights(H: int, I: int, dtype: torch.dtype, *, fp8: bool = False) -> GluWeights:
    """Return weights without memory, to plan with: of `dtype`, or fp8 for tokens of `dtype`."""
    IP = padded_width(I)
    gate_up = torch.empty((2, IP, H), dtype=FP8 if fp8 else dtype, device="meta")
    down = torch.empty((H, IP), dtype=FP8 if fp8 else dtype, device="meta")
    if not fp8:
        return GluWeights(gate_up, down, I)
    gate, up, of_down = (torch.empty(rows, dtype=dtype, device="meta") for rows in (I, I, H))
    return GluWeights(gate_up, down, I, gate_scale=gate, up_scale=up, down_scale=of_down)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with contiguous rows that start at 16-byte boundaries where H allows it: itself, or a copy."""
    M, H = x.shape
    if M == 1 and x.stride(0) != H:
        x = x.as_strided((1, H), (H, x.stride(1)))  # the row stride of a single row means nothing
    plain = x.stride(1) == 1 or H == 1
    apart = x.stride(0) >= H
    on_boundary = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    if plain and apart and (on_boundary or not rows_aligned(H, x.dtype)):
        return x
    return x.clone(memory_format=torch.contiguous_format)
