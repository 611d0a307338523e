import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from csrc_triton import layout
from gluprune.runtime import aligned
from tests.helpers.poison import poison_empty

WIDTHS = [1, 37, 127, 128, 129, 256, 300]


def make_weights(width, hidden, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_align_gives_the_padded_layout_with_zeros_and_keeps_every_bit(width, dtype, monkeypatch):
    poison_empty(monkeypatch)
    hidden, padded = 24, layout.padded_width(width)
    weights = make_weights(width, hidden, dtype)
    before = [weight.detach().clone() for weight in weights]
    identities = [id(weight) for weight in weights]
    assert layout.padded_buffers(*weights) is None
    aligned.align(*weights)

    gate_up, down = layout.padded_buffers(*weights)
    assert gate_up.shape == (2, padded, hidden) and gate_up.is_contiguous()
    assert down.shape == (hidden, padded) and down.is_contiguous()
    assert torch.equal(gate_up[0, :width], before[0]) and torch.equal(gate_up[1, :width], before[1])
    assert torch.equal(down[:, :width], before[2])
    assert gate_up[:, width:].eq(0).all() and down[:, width:].eq(0).all()
    for weight, old, identity in zip(weights, before, identities):
        assert id(weight) == identity and torch.equal(weight, old)
    # The weights are views of the buffers.
    gate_up[1, 0, 0], down[0, 0] = 7, 8
    assert weights[1][0, 0] == 7 and weights[2][0, 0] == 8


@pytest.mark.parametrize("width", WIDTHS)
def test_separate_restores_plain_memory(width):
    weights = make_weights(width, 24)
    before = [weight.detach().clone() for weight in weights]
    aligned.align(*weights)
    for weight, old in zip(weights, before):
        aligned.separate(weight)
        assert torch.equal(weight, old) and weight.is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes and weight.storage_offset() == 0


def test_align_twice_moves_nothing_and_after_a_change_only_what_changed():
    weights = make_weights(37, 24)
    aligned.align(*weights)
    addresses = [weight.data_ptr() for weight in weights]
    aligned.align(*weights)
    assert [weight.data_ptr() for weight in weights] == addresses
    weights[2].data = weights[2].detach().clone()
    assert not aligned.is_aligned(*weights)
    aligned.align(*weights)
    assert aligned.is_aligned(*weights) and [weight.data_ptr() for weight in weights[:2]] == addresses[:2]


@pytest.mark.parametrize("replaced", [0, 1, 2])
@pytest.mark.parametrize("width", [37, 128])
def test_a_replaced_weight_is_noticed(width, replaced):
    weights = make_weights(width, 24)
    aligned.align(*weights)
    weights[replaced].data = weights[replaced].detach().clone(memory_format=torch.contiguous_format)
    # A separate down weight whose width is a multiple of 128 already has the layout.
    assert aligned.is_aligned(*weights) == (replaced == 2 and width == 128)


def test_halves_of_different_buffers_are_not_aligned():
    first, second = make_weights(37, 24, seed=1), make_weights(37, 24, seed=2)
    aligned.align(*first)
    aligned.align(*second)
    assert layout.padded_buffers(first[0], second[1], first[2]) is None
    assert layout.padded_buffers(first[1], first[0], first[2]) is None


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 300), st.data())
def test_slices_of_a_buffer_do_not_count_as_zero_padded(width, data):
    """A weight that was sliced in place is followed by the removed neurons, not by zeros."""
    narrower = data.draw(st.integers(1, width - 1))
    weights = make_weights(width, 8)
    aligned.align(*weights)
    gate, up, down = weights
    gate.data, up.data, down.data = gate.data[:narrower], up.data[:narrower], down.data[:, :narrower]
    assert layout.padded_buffers(*weights) is None
    before = [weight.detach().clone() for weight in weights]
    aligned.align(*weights)
    gate_up, padded_down = layout.padded_buffers(*weights)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before))
    assert gate_up[:, narrower:].eq(0).all() and padded_down[:, narrower:].eq(0).all()


def test_views_that_begin_later_in_a_buffer_are_not_aligned():
    """By one row of the padding for gate, by one column for down."""
    gate, up, down = make_weights(37, 48)
    aligned.align(gate, up, down)
    assert aligned.is_aligned(gate, up, down)
    shifted = gate.detach().as_strided(gate.shape, gate.stride(), 48)
    assert not aligned.is_aligned(shifted, up, down)
    assert not aligned.is_aligned(gate, up, down.detach().as_strided(down.shape, down.stride(), 1))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_packed_weight_stays_contiguous_and_keeps_every_bit(width, monkeypatch):
    poison_empty(monkeypatch)
    packed, down = nn.Parameter(torch.randn(2 * width, 24)), nn.Parameter(torch.randn(24, width))
    before, address, padded = packed.detach().clone(), packed.data_ptr(), layout.padded_width(width)
    assert (layout.padded_buffers(*packed.chunk(2), down) is None) == (width % layout.PAD > 0)
    aligned.align_packed(packed, down)
    assert torch.equal(packed, before) and packed.is_contiguous()
    assert (packed.data_ptr() == address) == (width % layout.PAD == 0)
    gate_up, padded_down = layout.padded_buffers(*packed.chunk(2), down)
    assert gate_up.shape == (2, padded, 24) and gate_up.stride() == (width * 24, 24, 1)
    assert torch.equal(gate_up[0, :width], before[:width]) and torch.equal(gate_up[1, :width], before[width:])
    assert gate_up[1, width:].eq(0).all() and padded_down[:, width:].eq(0).all()
    gate_up[1, 0, 0] = 7  # a view of the weight
    assert packed[width, 0] == 7

    address = packed.data_ptr()
    aligned.align_packed(packed, down)
    assert packed.data_ptr() == address and aligned.is_alone(packed)
    alias = aligned.with_own_storage(packed)
    assert alias.data_ptr() == address and alias.untyped_storage().nbytes() == packed.nbytes
    aligned.separate(packed)
    assert packed.untyped_storage().nbytes() == packed.nbytes and packed[width, 0] == 7
    assert (packed.data_ptr() == address) == (width % layout.PAD == 0)


def test_packed_halves_of_anything_else_are_not_aligned():
    packed, down = nn.Parameter(torch.randn(2 * 37, 24)), nn.Parameter(torch.randn(24, 37))
    other = nn.Parameter(packed.detach().clone())
    aligned.align_packed(packed, down)
    aligned.align_packed(other, down)
    (gate, up), (_, other_up) = packed.chunk(2), other.chunk(2)
    assert aligned.is_aligned(gate, up, down)
    for first, second in ((up, gate), (gate, gate), (gate, other_up), (gate[:36], up[:36]), (gate, up[:36])):
        assert not aligned.is_aligned(first, second, down)
    narrower = packed.data[:72]  # the halves are contiguous with 36 neurons, but lie in the memory of 37
    assert not aligned.is_aligned(*narrower.chunk(2), down)
    down.data = down.detach().clone()
    assert not aligned.is_aligned(gate, up, down)


def test_shared_memory_is_not_replaced():
    flat = torch.randn(3 * 37 * 24)
    borrowed = nn.Parameter(flat[: 37 * 24].view(37, 24))
    assert not aligned.is_alone(borrowed)
    address = borrowed.data_ptr()
    aligned.separate(borrowed)
    assert borrowed.data_ptr() == address
    weights = make_weights(37, 24)
    assert all(map(aligned.is_alone, weights))
    aligned.align(*weights)
    assert all(map(aligned.is_alone, weights))


def test_with_own_storage_shares_the_memory_and_covers_the_view():
    weights = make_weights(37, 24, torch.bfloat16)
    aligned.align(*weights)
    for weight in weights:
        alias = aligned.with_own_storage(weight)
        assert alias.data_ptr() == weight.data_ptr() and alias.shape == weight.shape and not alias.requires_grad
        extent = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride()))
        assert alias.untyped_storage().nbytes() == extent * weight.element_size()
    alias = aligned.with_own_storage(weights[0])
    del weights
    assert alias.isfinite().all()  # it keeps the buffer alive


def test_weights_moved_in_inference_mode_can_be_trained():
    weights = make_weights(37, 24, torch.float32)
    with torch.inference_mode():
        aligned.align(*weights)
        assert not any(weight.is_inference() for weight in weights)
        for weight in weights:
            aligned.separate(weight)
    sum(weight.sum() for weight in weights).backward()
    assert all(weight.grad is not None for weight in weights)


def test_layout_survives_saving():
    weights = make_weights(37, 24)
    aligned.align(*weights)
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert aligned.is_aligned(*loaded) and all(torch.equal(new, old) for new, old in zip(loaded, weights))


def test_copies_are_independent_of_the_original():
    weights = make_weights(37, 24)
    aligned.align(*weights)
    copies = copy.deepcopy(weights)
    aligned.align(*copies)
    with torch.no_grad():
        for weight in copies:
            weight.zero_()
    assert all(weight.abs().sum() > 0 for weight in weights)


def test_extra_memory_is_gate_and_up_of_the_layer(monkeypatch):
    """No buffer is larger than its weights, and the old memory of a weight is freed before the next buffer."""
    width, hidden = 37, 24
    weights = make_weights(width, hidden)
    allocated = []
    empty_buffer = aligned._empty_buffer
    dead = []

    def record(like, shape, extra):
        if allocated:
            dead.append([reference() is None for reference in references[:2]])
        allocated.append(torch.Size(shape).numel() + extra)
        return empty_buffer(like, shape, extra)

    import weakref

    references = [weakref.ref(weight.data.untyped_storage()) for weight in weights]
    monkeypatch.setattr(aligned, "_empty_buffer", record)
    aligned.align(*weights)
    assert allocated == [2 * 128 * hidden + 91, hidden * 128 + 91]
    assert dead == [[True, True]]
