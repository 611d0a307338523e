"""The RMSNorm kernel against float64, and bit for bit against eager code where the order of the sum does not matter."""

import pytest
import torch

from csrc_triton import rms_norm
from csrc_triton.norm import ROUNDINGS
from tests.helpers.poison import poison_empty
from tests.helpers.tiny_models import DEVICE

# Triton's interpreter truncates to bfloat16.
DTYPES = [torch.float16, torch.float32, *([] if DEVICE == "cpu" else [torch.bfloat16])]


def eager(x, weight, eps, rounding):
    """Llama's, OLMo 2's and Gemma's norm."""
    v = x.float()
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
    if rounding == "scaled":
        return weight * v.to(x.dtype)
    return (weight * v).to(x.dtype) if rounding == "product" else (v * (1.0 + weight.float())).type_as(x)


def exact(shape, seed):
    """Multiples of 1/8 up to 2: the squares of a power of two of them are summed exactly in any order."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 2048), (7, 128), (2, 3, 4, 16), (130, 32), (5, 1)])
def test_bits_of_the_eager_code(shape, rounding, dtype, monkeypatch):
    poison_empty(monkeypatch)
    x, weight = exact(shape, 0).to(dtype), torch.randn(shape[-1], device=DEVICE).to(dtype)
    y = rms_norm(x, weight, 1e-5, rounding)
    assert y.dtype == dtype and y.shape == x.shape
    assert torch.equal(y, eager(x, weight, 1e-5, rounding))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", [(3, 577), (1, 48), (9, 3), (2, 3000)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_float64(shape, rounding, scale):
    generator = torch.Generator().manual_seed(1)
    x = scale * torch.randn(shape, generator=generator)
    weight = torch.randn(shape[-1], generator=generator)
    v = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = v * (weight.double() + (rounding == "offset"))
    found = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6, rounding)
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-6, rtol=1e-6)


def test_special_values():
    x = torch.zeros(4, 16, device=DEVICE)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    weight = torch.ones(16, device=DEVICE)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), eager(x, weight, 1e-6, "scaled"), equal_nan=True)
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, 16)


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        (
            lambda x, w: (x, w[:-1], 1e-6),
            ValueError,
            r"x must be \[..., H\] and weight \[H\], got \[3, 16\] and \[15\]",
        ),
        (lambda x, w: (x.t(), x[:, 0], 1e-6), ValueError, "must be contiguous"),
        (
            lambda x, w: (x, w, 1e-6, "other"),
            ValueError,
            "rounding must be one of scaled, product, offset, got 'other'",
        ),
        (lambda x, w: (x.double(), w.double(), 1e-6), TypeError, "x must be one of bfloat16, float16, float32, got"),
        (lambda x, w: (x, w.half(), 1e-6), TypeError, "weight must be torch.float32"),
    ],
)
def test_bad_arguments(arguments, kind, words):
    with pytest.raises(kind, match=words):
        rms_norm(*arguments(torch.ones(3, 16, device=DEVICE), torch.ones(16, device=DEVICE)))
