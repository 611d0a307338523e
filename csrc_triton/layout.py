"""The memory layout of the weights of a GLU MLP, and what all kernels agree on. Imports only torch.

Kernels load 16 bytes at a time, which needs every row to start on a 16-byte boundary and every loop to end on one. The
weights are therefore views of two buffers, padded with zeros to `IP`, the intermediate size `I` rounded up to 128:

    gate_up [2, IP, H]    gate = gate_up[0, :I]    up = gate_up[1, :I]
    down    [H, IP]       down = down[:, :I]

Zero rows and columns do not change the result. A packed gate_up weight `[2 * I, H]` must stay contiguous, so its buffer
is `[I + IP, H]`: the up rows follow the gate rows directly, and kernels do not compute neurons from I on.

fp8 weights have the same layout, in single bytes.

The layout is recognised from the weights only, by strides, offsets and the size of the storage. A storage ends in
IP - I more elements: its size then determines the I that its padding is zero for, and a weight that was sliced narrower
within the buffer is not mistaken for one followed by zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PAD = 128  # the intermediate size is padded to a multiple of this
FP8 = torch.float8_e4m3fn  # 1 sign, 4 exponent and 3 mantissa bits, no infinity
FP8_SM = 89  # the lowest compute capability, times ten, that converts FP8
MOST_NORM_COLUMNS = 1 << 16  # a program of the norm holds a whole row
ACTIVATIONS = ("silu", "gelu_tanh")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def cdiv(a: int, b: int) -> int:
    """Return `a / b` rounded up. `triton.cdiv` does the same, but takes microseconds per call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n >= 1`."""
    return 1 << (n - 1).bit_length()


def padded_width(intermediate_size: int) -> int:
    """Return the intermediate size rounded up to a multiple of `PAD`."""
    return -(-intermediate_size // PAD) * PAD


def rows_aligned(columns: int, dtype: torch.dtype) -> bool:
    """Return whether contiguous rows of `columns` elements start at 16-byte boundaries."""
    return columns * dtype.itemsize % 16 == 0


def first_up_row(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor | None = None) -> int | None:
    """Return the row of the gate_up buffer where `up` begins: I for a packed weight, else IP.

    Args:
        gate: `[I, H]`.
        up: `[I, H]`.
        down: `[H, I]`; None to check only gate and up.

    Returns:
        The row, or None if the weights are not in the padded layout.
    """
    storage = gate.untyped_storage()
    if storage.data_ptr() != up.untyped_storage().data_ptr() or gate.shape != up.shape or gate.storage_offset() != 0:
        return None
    if not gate.is_contiguous() or not up.is_contiguous():
        return None
    rows, columns = gate.shape
    offset, padded = up.storage_offset(), padded_width(rows)
    first = padded if offset == padded * columns else rows
    if offset != first * columns or (down is not None and not is_padded_down(down)):
        return None
    return first if storage.nbytes() // gate.element_size() == _gate_up_elements(rows, columns, first) else None


def padded_buffers(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the buffers that aligned weights are views of, as further views of the same memory.

    Args:
        gate: `[I, H]`; the first half of a packed weight if there is one.
        up: `[I, H]`; the second half.
        down: `[H, I]`.

    Returns:
        gate_up `[2, IP, H]` and down `[H, IP]`, both contiguous except that the halves of a packed gate_up overlap;
        None if the weights are not in the padded layout.
    """
    gate_up = padded_gate_up(gate, up)
    if gate_up is None or not is_padded_down(down):
        return None
    _, padded, columns = gate_up.shape
    return gate_up, down.detach().as_strided((columns, padded), (padded, 1), 0)


def padded_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
    """Return the gate_up buffer `[2, IP, H]` of `padded_buffers`; None if gate and up are not in the padded layout."""
    row = first_up_row(gate, up)
    if row is None:
        return None
    columns, padded = gate.shape[1], padded_width(gate.shape[0])
    return gate.detach().as_strided((2, padded, columns), (row * columns, columns, 1))


def usable_buffers(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what kernels can use of weights that need not be in the padded layout; None if they cannot.

    A down projection of an unaligned width without gaps is copied into a buffer. This is how an unaligned width trains:
    optimizers need weights without gaps between rows.

    Args:
        gate: `[I, H]`.
        up: `[I, H]`.
        down: `[H, I]`.

    Returns:
        The result of `usable_gate_up`, and down `[H, IP]`.
    """
    buffers, missing = padded_buffers(gate, up, down), -down.shape[1] % PAD
    if buffers is not None:
        return buffers
    gate_up = usable_gate_up(gate, up)
    if gate_up is None or not (missing or is_plain(down)):
        return None
    return gate_up, F.pad(down, (0, missing)) if missing else down.detach()


def usable_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
    """Return the buffer `[2, IP, H]`, or gate alone `[1, I, H]` if up is elsewhere; None if kernels cannot use them."""
    gate_up = padded_gate_up(gate, up)
    if gate_up is None and gate.dtype in DTYPES.values() and is_plain(gate) and is_plain(up):
        return gate.detach()[None]
    return gate_up


def is_half(weight: torch.Tensor, half: int) -> bool:
    """Return whether `weight` `[I, H]` is the gate (0) or up (1) half of a gate_up buffer."""
    rows, columns = weight.shape
    padded = padded_width(rows)
    return (
        weight.storage_offset() == half * padded * columns
        and weight.is_contiguous()
        and storage_elements(weight) == _gate_up_elements(rows, columns, padded)
    )


def is_packed(weight: torch.Tensor) -> bool:
    """Return whether `weight` `[2 * I, H]` fills a packed gate_up buffer except for its padding."""
    rows, columns = weight.shape
    return (
        weight.storage_offset() == 0
        and weight.is_contiguous()
        and rows % 2 == 0
        and storage_elements(weight) == _gate_up_elements(rows // 2, columns, rows // 2)
    )


def is_padded_down(weight: torch.Tensor) -> bool:
    """Return whether `weight` `[H, I]` fills a down buffer except for its padding."""
    rows, columns = weight.shape
    padded = padded_width(columns)
    return (
        weight.storage_offset() == 0
        and weight.stride() == (padded, 1)
        and storage_elements(weight) == rows * padded + padded - columns
    )


def is_plain(weight: torch.Tensor) -> bool:
    """Return whether kernels can use `weight` where it is, without padding: contiguous from a 16-byte boundary."""
    return weight.is_contiguous() and weight.data_ptr() % 16 == 0


def storage_elements(tensor: torch.Tensor) -> int:
    """Return how many elements the storage of a tensor holds."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _gate_up_elements(rows: int, columns: int, up_row: int) -> int:
    """Return the elements of the storage of a gate_up buffer."""
    padded = padded_width(rows)
    return (up_row + padded) * columns + padded - rows
