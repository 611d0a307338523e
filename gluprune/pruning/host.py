"""Extremes, rows and columns of weights on a CPU, by NumPy on their bits.

All of this is bound by memory. It does not use the threads of PyTorch's operators: they wait for each other by
spinning, which takes more time than the work itself where other programs use the same cores. NumPy has no bfloat16, but
can move and compare the bits as integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from csrc_triton.scores.reference import WeightStatistics

Result = TypeVar("Result")

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 22  # bytes; less is not worth a thread


def _spans(length: int, nbytes: int) -> list[slice]:
    """Return slices of a length: one for each thread that is worth starting for as many bytes."""
    count = max(1, min(torch.get_num_threads(), nbytes // _PIECE, length))
    bounds = [length * piece // count for piece in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _map(function: Callable[[slice], Result], spans: Sequence[slice]) -> list[Result]:
    """Return the results of a function, computed in one thread for each span."""
    if len(spans) == 1:
        return [function(spans[0])]
    with ThreadPoolExecutor(len(spans)) as pool:
        return list(pool.map(function, spans))


def take(whole: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Return the rows or columns `index` of a tensor on the CPU: `index_select`.

    Args:
        whole: `[N]` or `[N, M]`, of a dtype of 2, 4 or 8 bytes.
        dim: 0 for rows, 1 for columns.
        index: int64 `[K]`, on the CPU.

    Returns:
        `[K]` or `[K, M]` for rows, `[N, K]` for columns, contiguous.
    """
    bits = _BITS[whole.element_size()]
    shape = list(whole.shape)
    shape[dim] = len(index)
    part = whole.new_empty(shape)
    source, target, chosen = whole.view(bits).numpy(), part.view(bits).numpy(), index.numpy()

    def take_span(rows: slice) -> None:
        if dim == 0:
            np.take(source, chosen[rows], axis=0, out=target[rows], mode="clip")
        else:
            np.take(source[rows], chosen, axis=1, out=target[rows], mode="clip")

    _map(take_span, _spans(len(part), whole.nbytes))
    return part


def peak_to_peak(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Return `max + |min|` over rows or columns of a weight on the CPU.

    Args:
        weight: `[N, M]`, any floating dtype of at least 2 bytes, any strides.
        dim: 0 for columns, 1 for rows.

    Returns:
        float32 `[M]` for columns, `[N]` for rows. NaN where there is a NaN.
    """
    extremes = _extremes_of_bits if weight.element_size() == 2 else _extremes
    lines = weight.shape[1 - dim]
    found = _map(
        lambda span: extremes(weight.narrow(1 - dim, span.start, span.stop - span.start), dim),
        _spans(lines, weight.nbytes),
    )
    return found[0] if len(found) == 1 else torch.cat(found)


def _extremes(weight: torch.Tensor, dim: int) -> torch.Tensor:
    values = weight.numpy()
    return torch.from_numpy(values.max(dim)).float() + torch.from_numpy(values.min(dim)).float().abs()


def _extremes_of_bits(weight: torch.Tensor, dim: int) -> torch.Tensor:
    # Read as signed integers, the bits of positive numbers are ordered as the numbers, and above those of all negative
    # ones. Read as unsigned integers, those of negative numbers are ordered by magnitude, and above all positive ones.
    bits = weight.view(torch.int16).numpy()
    highest = torch.from_numpy(bits.max(dim))
    lowest = torch.from_numpy(bits.view(np.uint16).max(dim).view(np.int16))
    found = highest.view(weight.dtype).float() + lowest.view(weight.dtype).float().abs()
    one_sign = (highest < 0) | (lowest >= 0)
    if one_sign.any():
        lines = weight.movedim(dim, 1)[one_sign].float()
        found[one_sign] = lines.amax(1) + lines.amin(1).abs()
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch's operators use one thread of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class HostStatistics(WeightStatistics):
    """`WeightStatistics` of weights on the CPU."""

    def _reduced(self, weight: torch.Tensor, dim: int, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with one_thread():
            return super()._reduced(weight, dim, reduce)

    def _peak_to_peak(self, weight: torch.Tensor, dim: int) -> torch.Tensor:
        return peak_to_peak(weight, dim)
