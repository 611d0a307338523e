"""The refitted down projection compared with least squares in float64."""

import logging
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gluprune.calibration.least_squares import RIDGE
from gluprune.pruning.compensate import refitted_down, replace_down

SIZES = {
    "tokens": st.integers(1, 90),
    "neurons": st.integers(2, 40),
    "hidden": st.integers(1, 17),
    "share": st.floats(0, 1),
    "dead": st.integers(0, 3),
    "seed": st.integers(0, 2**31),
}


def case(tokens, neurons, hidden, share, dead, seed, dtype=torch.float32):
    """Correlated X `[T, I]` (float64) with some dead neurons, a down projection and the kept neurons."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(tokens, neurons // 2 + 1, generator=generator, dtype=torch.float64)
    x = sources @ torch.randn(neurons // 2 + 1, neurons, generator=generator, dtype=torch.float64)
    x += 0.3 * torch.randn(tokens, neurons, generator=generator, dtype=torch.float64)
    x[:, torch.randperm(neurons, generator=generator)[:dead]] = 0
    down = torch.randn(hidden, neurons, generator=generator).to(dtype)
    width = max(1, min(neurons - 1, round(share * neurons)))
    kept = torch.randperm(neurons, generator=generator)[:width].sort().values
    return x, down, kept


def ridge_solution(x, down, kept, ridge):
    """argmin ||X W - X_S W'||^2 + ridge ||W' - W_S||^2 in float64, as one stacked problem: `[H, width]`."""
    weight = down.double().T
    rows = torch.cat([x[:, kept], ridge**0.5 * torch.eye(len(kept), dtype=torch.float64)])
    values = torch.cat([x @ weight, ridge**0.5 * weight[kept]])
    return torch.linalg.lstsq(rows, values, driver="gelsd").solution.T


def residual(x, down, kept, new):
    return (x @ down.double().T - x[:, kept] @ new.double().T).square().sum().item()


@settings(max_examples=150, deadline=None)
@given(**SIZES)
def test_least_squares(tokens, neurons, hidden, share, dead, seed):
    x, down, kept = case(tokens, neurons, hidden, share, dead, seed)
    gram = x.T @ x
    found = refitted_down(down, kept, gram.float())
    ridge = 0.01 * gram.diagonal().mean().item()
    expected = ridge_solution(x, down, kept, ridge) if ridge else down[:, kept].double()
    assert found.dtype == down.dtype and found.shape == expected.shape and found.is_contiguous()
    # float32 Gram, condition at most 100 * I: errors stay near 4000 * 1.2e-7.
    torch.testing.assert_close(found.double(), expected, rtol=5e-4, atol=5e-4)


@settings(max_examples=150, deadline=None)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), **SIZES)
def test_never_worse_than_plain_narrowing(dtype, **sizes):
    x, down, kept = case(**sizes, dtype=dtype)
    found = refitted_down(down, kept, (x.T @ x).float())
    plain = residual(x, down, kept, down[:, kept])
    assert residual(x, down, kept, found) <= plain * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_much_better_where_neurons_are_correlated(dtype):
    x, down, kept = case(2000, 40, 16, 0.75, 0, seed=5, dtype=dtype)
    found = refitted_down(down, kept, (x.T @ x).float())
    assert residual(x, down, kept, found) < 0.05 * residual(x, down, kept, down[:, kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_removing_nothing_keeps_the_weights(dtype):
    x, down, _ = case(50, 23, 9, 0.5, 2, seed=1, dtype=dtype)
    assert torch.equal(refitted_down(down, torch.arange(23), (x.T @ x).float()), down)


def test_no_activity_keeps_the_weights(caplog):
    _, down, kept = case(50, 23, 9, 0.5, 0, seed=2)
    assert torch.equal(refitted_down(down, kept, torch.zeros(23, 23)), down[:, kept])
    assert not caplog.records


def test_a_fit_that_rounding_makes_worse_is_discarded(caplog):
    """Corrections that are exact in float32 but noise after rounding to float16: the plain weights must be returned."""
    x = torch.eye(3, dtype=torch.float64)
    x[0, 2] = 1e-4  # neuron 2 is 1e-4 times neuron 0
    down = torch.tensor([[1000.0, 1.0, 1.0]], dtype=torch.float16)
    with caplog.at_level(logging.INFO, "gluprune"):
        found = refitted_down(down, torch.tensor([0, 1]), (x.T @ x).float(), "layer 7")
    assert torch.equal(found, down[:, :2])
    assert "layer 7: refitting gives no gain" in caplog.text


def test_a_step_beyond_the_optimum_is_kept_if_it_helps():
    """The optimum is 0.6 float16 steps away; rounding moves one full step, which is still nearer than none."""
    step = 2.0**-10
    x = torch.eye(2, dtype=torch.float64)
    x[0, 1] = 0.61
    down = torch.tensor([[1.0, step]], dtype=torch.float16)
    found = refitted_down(down, torch.tensor([0]), (x.T @ x).float())
    assert found.item() == 1 + step


def test_dead_neurons_are_logged(caplog):
    x, down, _ = case(50, 12, 5, 0.5, 0, seed=3)
    x[:, :2] = 0
    with caplog.at_level(logging.INFO, "gluprune"):
        found = refitted_down(down, torch.arange(9), (x.T @ x).float(), "layer 3")
    assert "layer 3: 2 of 9 kept neurons are dead" in caplog.text
    assert torch.equal(found[:, :2], down[:, :2])


def indefinite(neurons, share):
    """A symmetric matrix with a unit diagonal, whose first half has the smallest eigenvalue `-share`."""
    half = neurons // 2
    gram = torch.eye(neurons)
    gram[:half, :half] += (1 + share) / (half - 1) * (torch.eye(half) - torch.ones(half, half))
    gram[half:, :half] = gram[:half, half:] = 0.01
    return gram


def test_singular_gram_is_solved_with_more_ridge(caplog):
    gram, down = indefinite(20, 0.05), torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(10)
    found = refitted_down(down, kept, gram, "layer 4")
    assert "layer 4: Gram matrix near singular, solved in torch.float64 with 10 times the ridge" in caplog.text
    solved = gram[:10, :10].double() + 10 * RIDGE * torch.eye(10, dtype=torch.float64)
    change = torch.linalg.solve(solved, gram[:10, 10:].double() @ down[:, 10:].double().T).T
    torch.testing.assert_close(found.double(), down[:, kept].double() + change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gram", [indefinite(20, 5.0), torch.full((20, 20), torch.inf)], ids=["indefinite", "inf"])
def test_a_gram_matrix_that_no_ridge_repairs_keeps_the_weights(gram, caplog):
    down = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(refitted_down(down, torch.arange(10), gram, "layer 4"), down[:, :10])
    assert "layer 4: the Gram matrix is singular with every ridge tried" in caplog.text


def test_replace_can_be_undone():
    projection = nn.Linear(7, 3)
    parameter, before, bias = projection.weight, projection.weight.detach().clone(), projection.bias.detach().clone()
    new = torch.randn(3, 7)
    with ExitStack() as undo:
        replace_down(projection, new, undo)
        assert projection.weight is parameter and torch.equal(projection.weight, new)
    assert projection.weight is parameter and torch.equal(projection.weight, before)
    assert torch.equal(projection.bias, bias)
