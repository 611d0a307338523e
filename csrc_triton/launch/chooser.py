"""Choose the launch for a problem: from the tuned table if it has an entry, otherwise by heuristics.

A table belongs to one GPU model (`csrc_triton.launch.tables`). Nothing is tuned at run time.
"""

from __future__ import annotations

import functools

import torch

from csrc_triton.glu.down_decode import DownGemv, DownSplitK
from csrc_triton.glu.gate_up_decode import GateUpGemv, GateUpSwap
from csrc_triton.glu.gate_up_prefill import GateUpTile, GateUpTma
from csrc_triton.launch.configs import GateUpConfig, Launch, Problem
from csrc_triton.launch.device import usual_sm_count
from csrc_triton.launch.paths import FP8_PATHS, check_path
from csrc_triton.launch.tables import Table, m_bucket
from csrc_triton.layout import FP8, cdiv, next_power_of_2, rows_aligned


def choose(problem: Problem, path: str | None = None, table: Table | None = None) -> Launch:
    """Return the launch of a problem: the table's entry if it has one (for the forced `path`), else the heuristic's.

    Args:
        problem: what to run, with at least one token.
        path: forces one of `PATHS`; None chooses by problem.
        table: the tuned launches of the device, or None.

    Raises:
        ValueError: an unknown path, or "gemv" for more than one token.
    """
    check_path(path)
    if path == "gemv" and problem.M != 1:
        raise ValueError(f"path 'gemv' takes exactly one token, got {problem.M}")
    if problem.fp8:
        path = path or choose_path(problem)
        if path not in FP8_PATHS:
            problem = problem._replace(fp8=False)  # weights are dequantized first, then the others' launch
    entry = table.get(problem._replace(M=m_bucket(problem.M))) if table else None
    if entry is not None and (path is None or entry.path == path):
        return entry
    return heuristic(path or choose_path(problem), problem)


def choose_path(problem: Problem) -> str:
    """Return the path where there is no table entry: on sm_90 as measured on an H200, by arithmetic elsewhere."""
    M, sm = problem.M, problem.sm
    if sm < 80:
        return "cublas"  # the kernels use asynchronous copies and bfloat16 matrix instructions
    if M == 1:
        return "gemv"
    if problem.dtype == torch.float32 or not rows_aligned(problem.H, FP8 if problem.fp8 else problem.dtype):
        return "cublas"  # float32 has no fast exact dot in Triton; unaligned rows cannot be copied 16 bytes at a time
    if M <= 128:
        # One short side of the matrix unit holds up to 16 tokens. One row of tiles holds 128, which by arithmetic is
        # still bound by the weights (up to 263 tokens on H100).
        return triton_path(M)
    # Above that, the rate of the GEMM matters. On data-centre Blackwell cuBLAS pairs multiprocessors, which Triton does
    # not; on Hopper cuBLAS fills the chip better while there are few tiles.
    return "cublas" if 100 <= sm < 120 or (sm == 90 and M < 1024) else "prefill"


def triton_path(M: int) -> str:
    """Return the path of Triton kernels for `M` tokens, whether or not cuBLAS would be preferred."""
    return "gemv" if M == 1 else "decode" if M <= 16 else "small" if M <= 128 else "prefill"


@functools.lru_cache(maxsize=4096)
def heuristic(path: str, problem: Problem) -> Launch:
    """Return the configurations of `path` where no table has any."""
    if path == "cublas":
        return Launch(path, None, None)
    if path == "gemv":
        return Launch(path, _gate_up_gemv(problem), _down_gemv(problem))
    if path == "prefill":
        return Launch(path, _gate_up_prefill(problem), None)
    return _few_tokens(path, problem)


def token_block(path: str, M: int) -> int:
    """Return the tokens of a tile on the paths "decode" and "small"."""
    return 16 if path == "decode" else min(max(next_power_of_2(M), 32), 128)


def _gate_up_gemv(problem: Problem) -> GateUpGemv:
    # Two neurons, gate and up, are four rows: with one warp per 2 KB of a row every thread has 256 bytes (16 loads) in
    # flight and keeps them in 64 registers. fp8 weights are half as long, but need registers to be converted.
    row_bytes = next_power_of_2(problem.H) * problem.dtype.itemsize
    return GateUpGemv(block_n=2, num_warps=min(max(row_bytes >> 11, 1), 16), pdl=problem.sm >= 90)


def _down_gemv(problem: Problem) -> DownGemv:
    return DownGemv(block_n=1, block_k=2048 // problem.weight_itemsize, num_warps=4, pdl=problem.sm >= 90)


def _few_tokens(path: str, problem: Problem) -> Launch:
    """Return the launch of "decode" and "small": one row of tiles for up to 128 tokens reads every weight once."""
    M, sm, itemsize = problem.M, problem.sm, problem.dtype.itemsize
    pdl = sm >= 90
    block_m = token_block(path, M)
    if problem.fp8:
        block_m = min(block_m, 64)  # for sm_120, Triton spills with 128
    # Rows of 256 bytes while the tokens' side is short; then of 128, so that four stages of the tallest tile fit 99 KB.
    block_k = (256 if block_m == 16 else 128) // itemsize
    # 32 gate and 32 up rows fill the long side of the matrix unit (64 rows of wgmma). Twice as many were faster on an
    # H200 up to 64 tokens, although there are then fewer programs than multiprocessors.
    gate_up = GateUpSwap(
        block_m=block_m,
        block_n=64,
        block_k=block_k,
        num_warps=4 if block_m == 16 else 8,
        num_stages=4,
        pdl=pdl,
    )
    rows = 64
    if problem.fp8:
        # Converted weights are in registers, from where wgmma must not take them (ptxas 12 corrupts it). Below 64 rows
        # Triton uses the older matrix instructions, at half the rate: enough to read the weights at up to 64 tokens.
        rows = 32
        gate_up = GateUpSwap(block_m=block_m, block_n=16, block_k=block_k, num_warps=4, num_stages=4, pdl=pdl)
    elif block_m == 128 or not gate_up.valid(problem):
        gate_up = GateUpSwap(block_m=block_m, block_n=32, block_k=block_k, num_warps=4, num_stages=4, pdl=pdl)
    # As many rows of down. Splits for two programs on each multiprocessor; above eight, partial results cost too much.
    tiles = cdiv(M, block_m) * cdiv(problem.H, rows)
    down = DownSplitK(
        block_m=block_m,
        block_n=rows,
        block_k=block_k,
        split_k=max(1, min(8, 2 * usual_sm_count(sm) // tiles, problem.I_padded // block_k)),
        num_warps=4,
        num_stages=4,
        pdl=pdl,
    )
    return Launch(path, gate_up, down)


def _gate_up_prefill(problem: Problem) -> GateUpConfig:
    sm, itemsize = problem.sm, problem.dtype.itemsize
    # The large tile (128 gate and 128 up rows) reads the least from the L2. With fewer tiles than multiprocessors much
    # of the chip would be idle, so the halved tile is used.
    fills = cdiv(problem.M, 128) * (problem.I_padded // 128) >= usual_sm_count(sm)
    config = GateUpTma(
        block_m=128,
        block_n=128 if fills else 64,
        block_k=128 // itemsize,  # 128 bytes: the widest swizzle of a TMA tile
        num_warps=8,
        num_stages=4 if sm < 100 else 3,  # four were 3 % faster on an H200; for sm_100 Triton 3.9 spills with four
    )
    # sm_120 has the matrix unit of sm_89, and Triton 3.6 leaves stack stores in the TMA kernel there.
    if sm < 120 and config.valid(problem):
        return config
    # 64-byte rows: three stages of the 128 x 256 tile take 48 KB.
    return GateUpTile(block_m=128, block_n=128, block_k=64 // itemsize, num_warps=8, num_stages=3)
