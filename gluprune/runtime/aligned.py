"""Aligned storage for the weights of one GLU MLP, without a second copy of any of them.

Kernels load 16 bytes at a time only if every row starts on a 16-byte boundary and every loop ends on one, which widths
such as 4916 or 7373 do not give. So the weights become views of two zero-padded buffers:

    gate_up [2, IP, H]    gate = gate_up[0, :I]    up = gate_up[1, :I]
    down    [H, IP]       down = down[:, :I]

with IP the intermediate size I rounded up to 128. Zero rows and columns add exactly nothing. A packed gate_up weight
`[2 * I, H]` must stay contiguous, so its buffer is `[I + IP, H]`: the up rows follow the gate rows at once, and kernels
compute no neuron from I on. The parameters stay what they were for everybody else: same objects, names, shapes and
values.

The layout is told from the weights alone, by strides, offsets and the size of the storage, so nothing can go stale when
somebody replaces a weight. A storage ends in IP - I more elements: its size alone then says which I its padding is
zero for, and a weight that somebody sliced narrower within the buffer is not taken for one with zeros behind it.
"""

from __future__ import annotations

import torch

ALIGNMENT = 128


def padded_width(intermediate_size: int) -> int:
    """The intermediate size rounded up to a multiple of 128."""
    return -(-intermediate_size // ALIGNMENT) * ALIGNMENT


def _elements(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _gate_up_elements(rows: int, columns: int, first_up_row: int) -> int:
    """Elements of the storage of a gate_up buffer."""
    padded = padded_width(rows)
    return (first_up_row + padded) * columns + padded - rows


def _is_half(weight: torch.Tensor, half: int) -> bool:
    """Whether `weight` `[I, H]` is the gate (0) or up (1) half of a gate_up buffer."""
    rows, columns = weight.shape
    padded = padded_width(rows)
    return (
        weight.storage_offset() == half * padded * columns
        and weight.is_contiguous()
        and _elements(weight) == _gate_up_elements(rows, columns, padded)
    )


def _is_packed(weight: torch.Tensor) -> bool:
    """Whether `weight` `[2 * I, H]` fills a packed gate_up buffer but for its padding."""
    rows, columns = weight.shape
    return (
        weight.storage_offset() == 0
        and weight.is_contiguous()
        and rows % 2 == 0
        and _elements(weight) == _gate_up_elements(rows // 2, columns, rows // 2)
    )


def _first_up_row(gate: torch.Tensor, up: torch.Tensor) -> int | None:
    """The row of a gate_up buffer where `up` begins; None if `gate` and `up` `[I, H]` are not the halves of one."""
    storage = gate.untyped_storage()
    if storage.data_ptr() != up.untyped_storage().data_ptr() or gate.shape != up.shape or gate.storage_offset() != 0:
        return None
    if not gate.is_contiguous() or not up.is_contiguous():
        return None
    rows, columns = gate.shape
    offset, padded = up.storage_offset(), padded_width(rows)
    first = padded if offset == padded * columns else rows
    if offset != first * columns:
        return None
    return first if storage.nbytes() // gate.element_size() == _gate_up_elements(rows, columns, first) else None


def _is_padded_down(weight: torch.Tensor) -> bool:
    """Whether `weight` `[H, I]` fills a down buffer but for its padding."""
    rows, columns = weight.shape
    padded = padded_width(columns)
    return (
        weight.storage_offset() == 0
        and weight.stride() == (padded, 1)
        and _elements(weight) == rows * padded + padded - columns
    )


def first_up_row(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> int | None:
    """The row of the gate_up buffer where `up` begins: I of a packed weight, else IP; None if the layout is another."""
    row = _first_up_row(gate, up)
    return row if row is not None and _is_padded_down(down) else None


def padded_buffers(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The buffers that aligned weights are views of, as further views of the same memory.

    Args:
        gate, up: `[I, H]`, the halves of a packed weight if there is one; down: `[H, I]`.

    Returns:
        gate_up `[2, IP, H]` and down `[H, IP]`, contiguous but for a packed gate_up, whose halves overlap; or None if the
        weights are not in the aligned layout.
    """
    row = first_up_row(gate, up, down)
    if row is None:
        return None
    columns, padded = gate.shape[1], padded_width(gate.shape[0])
    return (
        gate.detach().as_strided((2, padded, columns), (row * columns, columns, 1)),
        down.detach().as_strided((columns, padded), (padded, 1), 0),
    )


def is_aligned(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether the weights are in the aligned layout."""
    return first_up_row(gate, up, down) is not None


def _empty_buffer(like: torch.Tensor, shape: tuple[int, ...], extra: int) -> torch.Tensor:
    elements = torch.Size(shape).numel()
    storage = torch.empty(elements + extra, dtype=like.dtype, device=like.device)
    storage[elements:].zero_()
    return storage[:elements].view(shape)


@torch.no_grad()
def align(gate: torch.nn.Parameter, up: torch.nn.Parameter, down: torch.nn.Parameter) -> None:
    """Move separate weights into the aligned layout, in place; does nothing to weights that are in it.

    The Parameter objects stay; only their `data` changes. Above the weights themselves this takes the memory of gate
    and up of this one layer, for a moment.

    Args:
        gate, up: `[I, H]`; down: `[H, I]`; of one dtype on one device.
    """
    (rows, columns), padded = gate.shape, padded_width(gate.shape[0])
    if _first_up_row(gate, up) is None:
        gate_up = _empty_buffer(gate, (2, padded, columns), padded - rows)
        for half, weight in zip(gate_up, (gate, up)):
            half[:rows].copy_(weight)
            half[rows:].zero_()
            weight.data = half[:rows]
    _align_down(down)


@torch.no_grad()
def align_packed(gate_up: torch.nn.Parameter, down: torch.nn.Parameter) -> None:
    """`align` for a packed gate_up `[2 * I, H]`."""
    (rows, columns), width = gate_up.shape, down.shape[1]
    padded = padded_width(width)
    if not _is_packed(gate_up):
        buffer = _empty_buffer(gate_up, (width + padded, columns), padded - width)
        buffer[:rows].copy_(gate_up)
        buffer[rows:].zero_()
        gate_up.data = buffer[:rows]
    _align_down(down)


def _align_down(down: torch.nn.Parameter) -> None:
    if _is_padded_down(down):
        return
    rows, columns = down.shape
    padded = padded_width(columns)
    buffer = _empty_buffer(down, (rows, padded), padded - columns)
    buffer[:, :columns].copy_(down)
    buffer[:, columns:].zero_()
    down.data = buffer[:, :columns]


def _fills_storage(weight: torch.Tensor) -> bool:
    return _elements(weight) == weight.numel()


def is_view(weight: torch.Tensor) -> bool:
    """Whether a parameter is a view into an aligned buffer that holds more than it."""
    if type(weight) is not torch.nn.Parameter or weight.dim() != 2 or _fills_storage(weight):
        return False
    return _is_half(weight, 0) or _is_half(weight, 1) or _is_packed(weight) or _is_padded_down(weight)


def is_alone(weight: torch.nn.Parameter) -> bool:
    """Whether a weight may be given other memory: its storage holds nothing else, or is an aligned buffer.

    Views of anybody else's buffer (a sharding library's flat parameter) must stay where their owner writes.
    """
    return _fills_storage(weight) or is_view(weight)


@torch.no_grad()
def separate(weight: torch.nn.Parameter) -> None:
    """Give a weight that is a view into an aligned buffer plain contiguous memory of its own; leave others alone."""
    if is_view(weight):
        weight.data = weight.clone(memory_format=torch.contiguous_format)


def with_own_storage(view: torch.Tensor) -> torch.Tensor:
    """The same memory, detached, seen through a storage object that spans the view alone.

    Writers of checkpoints take tensors of one storage for tied weights: they copy them, or write the whole storage out.
    """
    return torch.from_dlpack(view.detach())
