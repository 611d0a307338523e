"""Rounding weights to float8_e4m3fn, each row with a scale that is a power of two.

A rounded weight has 4 significant bits (3 or fewer below `2 ** -6` times its scale). As scales are powers of two, it is
exact in bf16, fp16 and fp32: the smallest scale gives the smallest step of fp16, and the largest scale the largest
values that fp16 can hold. Scales change their dtype exactly, too.

The format: Micikevicius et al., "FP8 Formats for Deep Learning", 2022 (arXiv 2209.05433).
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
SCALE_EXPONENTS = -15, 7
LARGEST = LARGEST_FP8 * 2.0 ** SCALE_EXPONENTS[1]  # magnitude of a weight
NO_GRADIENT = "fp8 weights have no gradient: unpatch the model to train it"


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to fp8: every row by the smallest scale that its largest magnitude allows.

    Args:
        weight: `[N, K]`, of bf16, fp16 or fp32, with magnitudes of at most `LARGEST`.

    Returns:
        The bits, uint8 `[N, K]`, and the scales `[N]` in the dtype of the weight.
    """
    # frexp returns m * 2 ** e with 0.5 <= m < 1, and the largest fp8 value is 0.875 * 2 ** 9.
    mantissa, exponent = torch.frexp(weight.abs().amax(1).float())
    exponent = torch.where(mantissa > LARGEST_FP8 / 2**9, exponent - 8, exponent - 9)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(*SCALE_EXPONENTS))
    rounded = (weight.float() / scale[:, None]).to(FP8)
    return rounded.contiguous().view(torch.uint8), scale.to(weight.dtype)


def dequantize(bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight `[N, K]` of fp8 bits `[N, K]` and scales `[N]`, contiguous, in the dtype of the scales."""
    return (bits.view(FP8).float() * scale.float()[:, None]).to(scale.dtype).contiguous()
