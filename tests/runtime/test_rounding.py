"""Rounding to fp8, against a search through all values of the format."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gluprune.runtime.rounding import FP8, LARGEST, dequantize, quantize

VALUES = torch.arange(256, dtype=torch.uint8).view(FP8).double()
VALUES = VALUES[~VALUES.isnan()]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weights(seed, rows, columns, dtype, exponent):
    """A weight whose rows have very different magnitudes, with zeros and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight *= 2.0 ** torch.randint(-8, exponent, (rows, 1), generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    weight[0] = 0
    return weight.clamp(-LARGEST, LARGEST).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-7, 16),
)
def test_every_weight_becomes_the_nearest_value(seed, rows, columns, dtype, exponent):
    weight = weights(seed, rows, columns, dtype, exponent)
    bits, scale = quantize(weight)
    assert bits.dtype == torch.uint8 and scale.dtype == dtype and bits.is_contiguous()
    rounded = dequantize(bits, scale)
    assert rounded.dtype == dtype and rounded.is_contiguous()
    assert torch.equal(rounded.double(), bits.view(FP8).double() * scale.double()[:, None])  # exact
    for row, step, result in zip(weight.double(), scale.double(), rounded.double()):
        grid = VALUES * step
        nearest = (row[:, None] - grid).abs().amin(1)
        assert torch.equal((row - result).abs(), nearest)
        smallest = next(e for e in range(-15, 8) if row.abs().max() <= 448 * 2.0**e)
        assert math.log2(step) == smallest or not row.any()
    again, same = quantize(rounded)
    assert torch.equal(dequantize(again, same), rounded)
    for other in DTYPES:  # scales change their dtype exactly
        assert torch.equal(dequantize(bits, scale.to(other)).double(), rounded.double())


def test_gaps_between_rows_do_not_matter():
    weight = torch.randn(5, 16)
    bits, scale = quantize(weight[:, :11])
    assert torch.equal(bits, quantize(weight[:, :11].contiguous())[0]) and bits.is_contiguous() and scale.shape == (5,)
