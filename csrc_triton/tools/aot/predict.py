"""The time that a launch should take on an H100, from arithmetic: a GPU shows at once where the arithmetic is wrong.

    microseconds = LATENCY + max(bytes / BANDWIDTH, operations / RATE * rounds)

`bytes` counts every tensor once for being read and once for being written; `operations` those of the products, two for
each multiplication and addition, over whole tiles. `rounds` is how much longer the multiprocessor with the most work
needs than the average one: programs (tiles, where a program computes several) over multiprocessors, rounded up, over
the same not rounded. Caches are left out, and so is what limits a program that has too few loads in flight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton.launch.call import KernelCall
from csrc_triton.launch.device import SM_COUNT
from csrc_triton.layout import cdiv
from csrc_triton.tools.aot.ptx import Access

PREDICTED_SM = 90  # of the GPU that the constants describe: an H100 SXM
BANDWIDTH = 3.0e12  # bytes per second of a large copy
RATE = 790e12  # operations per second of a large product in bfloat16 or float16; in float32 it takes longer
LATENCY = 2.2  # microseconds of a launch in a CUDA graph: half of what the two of one token cost beside their bytes


class Prediction(NamedTuple):
    """What a launch moves and computes, and the time that this should take."""

    bytes: int
    operations: int
    microseconds: float


def predict(call: KernelCall, accesses: tuple[Access, ...], tokens: int) -> Prediction:
    """Return the prediction for one launch.

    Args:
        call: the launch.
        accesses: of the compiled kernel: which arguments it reads and writes.
        tokens: M, of which whole tiles are computed; 0 for statistics of weights.
    """
    # An access of unknown origin counts nothing.
    directions = {(access.argument, access.instruction == "st") for access in accesses}
    moved = sum(_bytes(call.args.get(argument)) for argument, _ in directions)
    operations, tiles = _products(call, tokens)
    share = tiles / SM_COUNT[PREDICTED_SM]
    rounds = math.ceil(share) / share
    seconds = max(moved / BANDWIDTH, operations / RATE * rounds)
    return Prediction(moved, operations, LATENCY + 1e6 * seconds)


def _tensor(value: object) -> torch.Tensor | None:
    tensor = value.base if isinstance(value, TensorDescriptor) else value
    return tensor if isinstance(tensor, torch.Tensor) else None


def _bytes(value: object) -> int:
    tensor = _tensor(value)
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _products(call: KernelCall, tokens: int) -> tuple[int, int]:
    """Return the operations of the products of a launch, and the tiles that they are divided into."""
    programs = math.prod(call.grid)
    weight = _tensor(call.args.get("gate_up", call.args.get("down")))
    if weight is None:
        return 0, programs
    block, block_n = (int(str(call.constants.get(size, 1))) for size in ("BLOCK_M", "BLOCK_N"))
    rows = cdiv(tokens, block)
    if call.kernel.__name__ == "gate_up_tma_kernel":  # persistent
        programs = rows * (call.args["IP"] // block_n)
    return 2 * rows * block * weight.numel(), programs
