"""Moves the weights of one GLU MLP into and out of aligned storage, without a second copy of any of them.

The layout is that of `csrc_triton.layout`: the weights become views of two zero-padded buffers. The parameters stay the
same for all other code: same objects, names, shapes and values. The layout is recognised from the weights only, so
replacing a weight leaves no stale state.
"""

from __future__ import annotations

import torch

from gluprune.runtime.operator import layout

ALIGNMENT = layout.PAD


def is_aligned(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor | None) -> bool:
    """Return whether the weights, without down if that is None, are in the aligned layout."""
    return layout.first_up_row(gate, up, down) is not None


def _empty_buffer(like: torch.Tensor, shape: tuple[int, ...], extra: int) -> torch.Tensor:
    elements = torch.Size(shape).numel()
    storage = torch.empty(elements + extra, dtype=like.dtype, device=like.device)
    storage[elements:].zero_()
    return storage[:elements].view(shape)


@torch.inference_mode(False)  # inference tensors could not be trained afterwards
@torch.no_grad()
def align(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor | None) -> None:
    """Move separate weights into the aligned layout, in place; weights already in it are left there.

    The tensor objects stay; only their `data` changes. This temporarily takes extra memory of the size of gate and
    up of this layer.

    Args:
        gate: `[I, H]`; all three are of one dtype on one device.
        up: `[I, H]`.
        down: `[H, I]`, or None to leave it where it is.
    """
    (rows, columns), padded = gate.shape, layout.padded_width(gate.shape[0])
    if layout.first_up_row(gate, up) is None:
        gate_up = _empty_buffer(gate, (2, padded, columns), padded - rows)
        for half, weight in zip(gate_up, (gate, up), strict=True):
            half[:rows].copy_(weight)
            half[rows:].zero_()
            weight.data = half[:rows]
    if down is not None:
        _align_down(down)


@torch.inference_mode(False)
@torch.no_grad()
def align_packed(gate_up: torch.Tensor, down: torch.Tensor | None) -> None:
    """Do the same as `align` for a packed gate_up `[2 * I, H]`."""
    (rows, columns), width = gate_up.shape, gate_up.shape[0] // 2
    padded = layout.padded_width(width)
    if not layout.is_packed(gate_up):
        buffer = _empty_buffer(gate_up, (width + padded, columns), padded - width)
        buffer[:rows].copy_(gate_up)
        buffer[rows:].zero_()
        gate_up.data = buffer[:rows]
    if down is not None:
        _align_down(down)


def _align_down(down: torch.Tensor) -> None:
    if layout.is_padded_down(down):
        return
    rows, columns = down.shape
    padded = layout.padded_width(columns)
    buffer = _empty_buffer(down, (rows, padded), padded - columns)
    buffer[:, :columns].copy_(down)
    buffer[:, columns:].zero_()
    down.data = buffer[:, :columns]


def _fills_storage(weight: torch.Tensor) -> bool:
    return layout.storage_elements(weight) == weight.numel()


def is_view(weight: torch.Tensor) -> bool:
    """Return whether a parameter is a view into an aligned buffer that is larger than the parameter."""
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.dim() != 2 or _fills_storage(weight):
        return False
    return (
        layout.is_half(weight, 0)
        or layout.is_half(weight, 1)
        or layout.is_packed(weight)
        or layout.is_padded_down(weight)
    )


def is_alone(weight: torch.Tensor) -> bool:
    """Return whether a weight may be moved to other memory: its storage holds nothing else, or is an aligned buffer.

    Views of a buffer owned by other code (a sharding library's flat parameter) must stay where that code writes.
    """
    return _fills_storage(weight) or is_view(weight)


@torch.inference_mode(False)
@torch.no_grad()
def separate(weight: torch.Tensor) -> None:
    """Move a weight that is a view into an aligned buffer into plain contiguous memory; others stay."""
    if is_view(weight):
        weight.data = weight.clone(memory_format=torch.contiguous_format)


def with_own_storage(view: torch.Tensor) -> torch.Tensor:
    """Return the same memory, detached, with a storage object that spans only the view.

    Checkpoint writers treat tensors of one storage as tied weights: they copy them, or write the whole storage.
    """
    return torch.from_dlpack(view.detach())
