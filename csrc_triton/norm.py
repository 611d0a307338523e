"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4) in one launch, rounded as transformers' eager code rounds.

Eager code launches about seven kernels for a norm; between the kernels of the MLPs these are most of a decode step's
launches. Families differ in where the result is rounded to the dtype of the tokens:

    "scaled"    weight * round(x / rms)             Llama and most others
    "product"   round(weight * (x / rms))           OLMo 2
    "offset"    round((x / rms) * (1 + weight))     Gemma
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from csrc_triton.launch.call import KernelCall, Plan
from csrc_triton.layout import DTYPES, MOST_NORM_COLUMNS, cdiv, next_power_of_2

ROUNDINGS = ("scaled", "product", "offset")
TILE = 2048  # elements of a program, unless a single row is longer


@triton.jit(do_not_specialize=["M", "scale", "eps"])
def rms_norm_kernel(
    x, weight, y, M, H, scale, eps, ROUNDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Map x `[M, H]` to y `[M, H]` with weight `[H]`; BLOCK_M rows per program. `scale` is 1 / H."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    columns = tl.arange(0, BLOCK_H)[None, :]  # [1, BLOCK_H]
    inside = (rows < M) & (columns < H)
    v = tl.load(x + rows * H + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
    w = tl.load(weight + columns, mask=columns < H, other=0.0).to(tl.float32)
    mean = tl.sum(v * v, axis=1, keep_dims=True) * scale
    v = v * tl.rsqrt(mean + eps)
    if ROUNDING == "scaled":
        v = v.to(y.dtype.element_ty).to(tl.float32) * w
    elif ROUNDING == "product":
        v = w * v
    else:
        v = v * (1.0 + w)
    tl.store(y + rows * H + columns, v.to(y.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: str = "scaled") -> torch.Tensor:
    """Normalise every row of `x` by its root mean square. No autograd.

    Args:
        x: `[..., H]`, contiguous; bfloat16, float16 or float32.
        weight: `[H]`, contiguous, of x's dtype and device.
        eps: added to the mean square.
        rounding: "scaled", "product" or "offset": see the module.

    Returns:
        A new tensor of x's shape and dtype.

    Raises:
        ValueError: wrong shapes or strides, an unknown rounding.
        TypeError: an unsupported dtype, or tensors of different dtypes or devices.

    Example:
        >>> import torch
        >>> from csrc_triton import rms_norm
        >>> y = rms_norm(torch.randn(3, 2048).bfloat16().cuda(), torch.ones(2048).bfloat16().cuda(), 1e-6)
    """
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x must be [..., H] and weight [H], got {list(x.shape)} and {list(weight.shape)}")
    if not 1 <= weight.shape[0] <= MOST_NORM_COLUMNS:
        raise ValueError(f"H must be between 1 and {MOST_NORM_COLUMNS}, got {weight.shape[0]}")
    if not x.is_contiguous() or not weight.is_contiguous():
        raise ValueError(f"x and weight must be contiguous, got strides {x.stride()} and {weight.stride()}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if x.dtype not in DTYPES.values():
        raise TypeError(f"x must be one of {', '.join(DTYPES)}, got {x.dtype}")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise TypeError(f"weight must be {x.dtype} on {x.device} like x, got {weight.dtype} on {weight.device}")
    if x.numel() == 0:
        return torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
        return plan_rms_norm(x.view(-1, x.shape[-1]), weight, eps, rounding).run().view(x.shape)


def plan_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: str) -> Plan:
    """Plan `rms_norm` of contiguous rows `[M, H]`, unchecked, at least one."""
    M, H = x.shape
    block_h = next_power_of_2(H)
    block_m = min(max(TILE // block_h, 1), next_power_of_2(M))
    y = torch.empty((M, H), dtype=x.dtype, device=x.device)
    call = KernelCall(
        rms_norm_kernel,
        (cdiv(M, block_m),),
        dict(x=x, weight=weight, y=y, M=M, H=H, scale=1.0 / H, eps=eps),
        dict(ROUNDING=rounding, BLOCK_M=block_m, BLOCK_H=block_h),
        num_warps=min(max(block_m * block_h // 512, 1), 16),
        num_stages=1,
        fp_fusion=False,  # as separate kernels, which round the mean before eps is added
    )
    return Plan(y, [call])
