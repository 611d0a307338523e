"""Extremes, rows and columns on the CPU against float64 and against indexing."""

import pytest
import torch

from csrc_triton.scores import reference
from csrc_triton.scores.reference import WeightStatistics
from gluprune.pruning import host

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request, monkeypatch):
    """Also split tensors that are too small to be worth it."""
    monkeypatch.setattr(host, "_PIECE", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def lines(dtype):
    """Rows `[9, 37]` of both signs, of one, of zeros of both signs, and with values that are not finite."""
    rows = torch.randn(9, 37)
    rows[1] = rows[1].abs()
    rows[2] = -rows[2].abs()
    rows[3] = 0.0
    rows[4] = -0.0
    rows[5] = rows[5].abs()
    rows[5, 7] = -0.0
    rows[6, 3] = float("inf")
    rows[7, 3] = -float("inf")
    rows[8] = rows[8].abs() + 1
    return rows.to(dtype)


def expected(weight, dim):
    weight = weight.double()
    return (weight.max(dim).values + weight.min(dim).values.abs()).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "every other", "transposed"])
def test_peak_to_peak(dtype, layout, threads):
    weight, dim = lines(dtype), 1
    if layout == "columns":
        weight, dim = weight.t().contiguous(), 0
    elif layout == "every other":
        weight = weight.repeat_interleave(2, 1)[:, ::2]
    elif layout == "transposed":
        weight = weight.t().contiguous().t()
    found = host.peak_to_peak(weight, dim)
    assert found.dtype == torch.float32
    # max and |min| are exact in float32; their sum is rounded once.
    torch.testing.assert_close(found, expected(weight, dim), rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dim", [0, 1])
def test_nan_is_found(dtype, sign, dim, threads):
    weight = lines(dtype)
    weight[2, 5] = sign * torch.tensor(float("nan"), dtype=dtype)
    found = host.peak_to_peak(weight if dim else weight.t().contiguous(), dim)
    assert found.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(11,), (11, 23), (11, 1)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 11])
def test_take(dtype, shape, count, threads):
    whole = torch.randn(shape, dtype=torch.float64).to(dtype)
    index = torch.randperm(11)[:count].sort().values
    found = host.take(whole, 0, index)
    assert torch.equal(found, whole[index]) and found.is_contiguous()
    if len(shape) == 2:
        columns = whole.t().contiguous()
        found = host.take(columns, 1, index)
        assert torch.equal(found, columns[:, index]) and found.is_contiguous()


def test_large_work_is_split(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert host._spans(100, host._PIECE - 1) == [slice(0, 100)]
    assert host._spans(100, 3 * host._PIECE) == [slice(0, 33), slice(33, 66), slice(66, 100)]
    assert len(host._spans(100, 9 * host._PIECE)) == 4
    assert host._spans(2, 9 * host._PIECE) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("name", ["gate_variance", "up_l1", "gate_l2", "down_l2"])
def test_operators_use_one_thread(name, monkeypatch):
    weights = torch.randn(11, 23), torch.randn(11, 23), torch.randn(23, 11)
    expected = getattr(WeightStatistics(*weights), name)
    counts, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda pieces: counts.append(torch.get_num_threads()) or cat(pieces))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(getattr(host.HostStatistics(*weights), name), expected)
        assert counts == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_extremes_do_not_use_operators(monkeypatch):
    weights = torch.randn(11, 23), torch.randn(11, 23), torch.randn(23, 11)
    names = ("gate_ppm", "up_ppm", "down_ppm")
    expected = [getattr(WeightStatistics(*weights), name) for name in names]
    monkeypatch.setattr(reference, "_ppm", None)
    found = host.HostStatistics(*weights)
    assert all(torch.equal(getattr(found, name), each) for name, each in zip(names, expected, strict=True))
