"""fp8 weights as weights of the tokens' dtype, for what multiplies many tokens: reading the weights costs little there.

Where the scales are powers of two, the products are exact.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from csrc_triton.glu.device_functions import load_bias
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch.call import KernelCall
from csrc_triton.layout import cdiv

BLOCK_ROWS, BLOCK_COLUMNS = 8, 512


@triton.jit(do_not_specialize=["rows"])
def dequantize_kernel(w, scale, out, rows, ROWS_STORED, COLUMNS, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Map fp8 w `[ROWS_STORED, COLUMNS]` and scale `[rows]` to out of w's shape; rows from `rows` on become zero."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    places = row.to(tl.int64)[:, None] * COLUMNS + columns  # [BLOCK_ROWS, BLOCK_COLUMNS]
    inside = columns < COLUMNS
    values = tl.load(w + places, mask=(row < rows)[:, None] & inside, other=0.0, eviction_policy="evict_first")
    values = values.to(tl.float32) * load_bias(scale, row, rows)[:, None]
    tl.store(out + places, values.to(out.dtype.element_ty), mask=(row < ROWS_STORED)[:, None] & inside)


def dequantize_call(w: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> KernelCall:
    """Return the launch that fills `out` with fp8 weights times their scales.

    Args:
        w: `[N, K]`, float8_e4m3fn, contiguous.
        scale: `[n]`, of the first n rows; n is at most N.
        out: `[N, K]`, contiguous, of the dtype of `scale`; its rows from n on become zero.
    """
    rows, columns = w.shape
    return KernelCall(
        dequantize_kernel,
        (cdiv(rows, BLOCK_ROWS), cdiv(columns, BLOCK_COLUMNS)),
        dict(w=w, scale=scale, out=out, rows=scale.shape[0], ROWS_STORED=rows, COLUMNS=columns),
        dict(BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS),
        num_warps=8,
        num_stages=1,
    )


def plan_dequantize(weights: GluWeights) -> tuple[GluWeights, list[KernelCall]]:
    """Plan fp8 weights as weights of the dtype of their scales, which take twice or four times the memory.

    Returns:
        The weights, with the halves of gate_up a padded width apart, and the calls that fill them.
    """
    scales = weights.gate_scale, weights.up_scale, weights.down_scale
    gate_scale, up_scale, down_scale = (scale for scale in scales if scale is not None)
    dtype = down_scale.dtype
    gate_up = torch.empty(weights.gate_up.shape, dtype=dtype, device=weights.gate_up.device)
    down = torch.empty_like(weights.down, dtype=dtype)
    calls = [
        dequantize_call(weights.gate_up[0], gate_scale, gate_up[0]),
        dequantize_call(weights.gate_up[1], up_scale, gate_up[1]),
        dequantize_call(weights.down, down_scale, down),
    ]
    plain = dataclasses.replace(weights, gate_up=gate_up, down=down, gate_scale=None, up_scale=None, down_scale=None)
    return plain, calls
