"""Widths and selections compared with independent implementations of the rules."""

import csv
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from gluprune.models.glu import count_parameters
from gluprune.models.widths import set_config_widths
from gluprune.pruning.widths import cost_of_coarseness, select, shrunk_costs, target_width, widths_by_cost

PUBLISHED = list(csv.DictReader((Path(__file__).parents[1] / "data" / "published_expansion_rates.csv").open()))
LLAMA_3_2 = {
    "1B": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64),
    "3B": dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128),
}


def nearest(wanted, multiple):
    """The nearest multiple, with ties rounded up, in exact arithmetic."""
    return int(Fraction(wanted, multiple) + Fraction(1, 2)) * multiple


@given(st.integers(2, 20000), st.floats(0.001, 0.999), st.sampled_from([1, 2, 7, 8, 16, 64, 128, 256]))
def test_pruning_ratio(width, ratio, multiple):
    expected = nearest(width - int(ratio * width), multiple)
    if 0 < expected < width:
        assert target_width(width, 64, pruning_ratio=ratio, multiple_of=multiple) == expected
    else:
        with pytest.raises(ValueError, match="rounds to"):
            target_width(width, 64, pruning_ratio=ratio, multiple_of=multiple)


@given(st.integers(1, 4096), st.integers(2, 20000), st.data(), st.sampled_from([1, 8, 128]))
def test_expansion_ratio_and_width(hidden, width, data, multiple):
    wanted = data.draw(st.integers(1, width - 1))
    expected = nearest(wanted, multiple)
    for target in ({"expansion_ratio": wanted / hidden}, {"width": wanted}):
        if 0 < expected < width:
            assert target_width(width, hidden, **target, multiple_of=multiple) == expected
        else:
            with pytest.raises(ValueError, match="rounds to"):
                target_width(width, hidden, **target, multiple_of=multiple)


@pytest.mark.parametrize("ratio, width", [(0.1, 7373), (0.2, 6554), (0.3, 5735), (0.4, 4916), (0.5, 4096), (0.6, 3277)])
def test_widths_of_the_paper(ratio, width):
    assert target_width(8192, 2048, pruning_ratio=ratio, multiple_of=1) == width


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row['Model Family']}-{row['Pruning %']}")
def test_published_parameter_counts(row):
    assert len(PUBLISHED) == 15
    shape = LLAMA_3_2[row["Model Family"].split("-")[0]]
    config = LlamaConfig(intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True, **shape)

    def millions():
        with torch.device("meta"):
            return count_parameters(LlamaForCausalLM(config)) / 1e6

    dense, hidden = millions(), config.hidden_size
    assert dense == pytest.approx(float(row["Original Params (M)"]), abs=0.005)
    assert 100 * 8192 / hidden == pytest.approx(float(row["Original Expansion %"]), abs=0.05)
    width = target_width(8192, hidden, pruning_ratio=int(row["Pruning %"]) / 100, multiple_of=1)
    set_config_widths(config, [width] * config.num_hidden_layers)
    pruned = millions()
    assert pruned == pytest.approx(float(row["Pruned Params (M)"]), abs=0.005)
    assert dense - pruned == pytest.approx(float(row["Params Saved (M)"]), abs=0.01)
    assert 100 * width / hidden == pytest.approx(float(row["Pruned Expansion %"]), abs=0.05)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), st.data())
def test_select_keeps_the_highest(values, data):
    scores = torch.tensor(values)
    width = data.draw(st.integers(1, len(values)))
    kept = select(scores, width)
    assert kept.dtype == torch.int64 and kept.shape == (width,)
    assert (kept.diff() > 0).all()
    dropped = torch.ones(len(values), dtype=torch.bool)
    dropped[kept] = False
    if dropped.any():
        assert scores[kept].min() >= scores[dropped].max()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of"),
        ({"pruning_ratio": 0.5, "width": 3}, "exactly one of"),
        ({"pruning_ratio": 0.0}, "between 0 and 1"),
        ({"pruning_ratio": 1.0}, "between 0 and 1"),
        ({"pruning_ratio": -0.1}, "between 0 and 1"),
        ({"pruning_ratio": float("nan")}, "between 0 and 1"),
        ({"expansion_ratio": 0.0}, "between 0 and the current"),
        ({"expansion_ratio": 4.0}, "between 0 and the current 4"),
        ({"expansion_ratio": 4.5}, "between 0 and the current 4"),
        ({"width": 0}, "between 1 and 399"),
        ({"width": 400}, "between 1 and 399"),
        ({"width": 401}, "between 1 and 399"),
        ({"width": 20, "multiple_of": 128}, "rounds to 0"),
        ({"width": 398, "multiple_of": 16}, "rounds to 400"),
        ({"width": 100, "multiple_of": 0}, "multiple_of must be"),
        ({"width": 100, "multiple_of": 2.5}, "multiple_of must be"),
    ],
)
def test_bad_targets(arguments, message):
    with pytest.raises(ValueError, match=message):
        target_width(400, 100, **arguments)


def test_targets_may_be_numbers_of_numpy():
    assert target_width(400, 100, width=np.int64(64), multiple_of=np.int32(64)) == 64
    for name, value, expected in (("pruning_ratio", 0.3, 280), ("expansion_ratio", 2.5, 250)):
        found = target_width(400, 100, **{name: np.float32(value)}, multiple_of=1)
        assert found == expected and type(found) is int


@pytest.mark.parametrize(
    "arguments", [{"width": 10.0}, {"width": True}, {"pruning_ratio": "0.4"}, {"expansion_ratio": True}]
)
def test_targets_of_the_wrong_type(arguments):
    with pytest.raises(TypeError, match="must be"):
        target_width(400, 100, **arguments)


@pytest.mark.parametrize("seed", range(20))
def test_widths_by_cost_are_the_cheapest(seed):
    """Compared with all combinations of widths, on random convex costs."""
    generator = torch.Generator().manual_seed(seed)
    removed, neurons, layers = [0, 4, 8, 16, 24], 32, 3
    slopes = torch.rand(layers, 4, generator=generator).sort(1).values
    costs = torch.cat([torch.zeros(layers, 1), (slopes * torch.tensor(removed).diff()).cumsum(1)], 1)
    multiple = [1, 2, 4][seed % 3]
    width = int(torch.randint(8 // multiple, 32 // multiple, (1,), generator=generator)) * multiple
    found = widths_by_cost(list(costs), removed, neurons, width, multiple_of=multiple)
    assert sum(found) == layers * width and all(w % multiple == 0 and 8 <= w <= 32 for w in found)

    def total(widths):
        return sum(np.interp(neurons - w, removed, layer.tolist()) for w, layer in zip(widths, costs))

    choices = range(8, 33, multiple)
    best = min(total(ws) for ws in product(choices, repeat=layers) if sum(ws) == layers * width)
    assert total(found) == pytest.approx(best, rel=1e-6)


def test_cost_of_coarseness():
    """By hand: 8 of 64 neurons go, all from the layer that costs less; as 32s, all 32 of them go there."""
    costs, removed = [torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 10.0, 40.0])], [0, 16, 32]
    assert widths_by_cost(costs, removed, 64, 60, multiple_of=8) == [56, 64]
    assert widths_by_cost(costs, removed, 64, 60, multiple_of=32) == [32, 64]
    assert cost_of_coarseness(costs, removed, 64, 60, multiple_of=32) == 4 / 0.5
    assert cost_of_coarseness(costs, removed, 64, 60, multiple_of=8) == 1
    assert cost_of_coarseness([torch.zeros(3)] * 2, removed, 64, 60, multiple_of=32) == 1


def test_widths_by_cost_with_costs_that_are_not_convex():
    """An expensive first step does not hide cheap ones that follow it."""
    costs = [torch.tensor([0.0, 3.0, 3.5, 4.0]), torch.tensor([0.0, 2.0, 4.0, 6.0])]
    assert widths_by_cost(costs, [0, 4, 8, 12], 16, 10, multiple_of=1) == [4, 16]
    # With few neurons, several steps remove the same number; the cost of the first counts.
    assert widths_by_cost(costs, [0, 0, 0, 6], 8, 5, multiple_of=1) == [2, 8]


def test_widths_by_cost_with_unaligned_sizes():
    costs = [torch.tensor([0.0, 1.0, 9.0]), torch.tensor([0.0, 2.0, 20.0])]
    assert widths_by_cost(costs, [0, 40, 90], 101, 101 - 10, multiple_of=8) == [80, 101]
    assert sum(widths_by_cost(costs, [0, 40, 90], 101, 60, multiple_of=8)) in range(2 * 60 - 7, 2 * 60 + 1)
    with pytest.raises(ValueError, match="a mean width of 10 leaves layers with fewer than 11 of their 101"):
        widths_by_cost(costs, [0, 40, 90], 101, 10, multiple_of=1)
    with pytest.raises(ValueError, match="a mean width of 60"):
        widths_by_cost(costs, [0, 40, 90], 101, 60, multiple_of=128)
    # The first step removes fewer neurons: the cost per neuron decides.
    costs = [torch.tensor([0.0, 6.0]), torch.tensor([0.0, 5.0])]
    assert widths_by_cost(costs, [0, 100], 101, 94, multiple_of=8) == [101, 80]


def test_shrunk_costs():
    costs = [torch.tensor([0.0, 0.0, 0.5, 2.0]), torch.tensor([0.0, 0.02, 0.5, 8.0]), torch.zeros(4)]
    torch.testing.assert_close(torch.stack(shrunk_costs(costs, 1.0)), torch.stack(costs))
    # By hand, with the means 0, 0.02 / 3, 1 / 3 and 10 / 3.
    expected = torch.tensor([[0, 0, 0.45179, 2.2724], [0, 0.015198, 0.45179, 6.4274], [0, 0, 0, 0]])
    torch.testing.assert_close(torch.stack(shrunk_costs(costs, 0.75)), expected, rtol=1e-4, atol=0)


def test_widths_differ_less_at_higher_ratios():
    steps = torch.arange(16.0)
    costs = [steps**2, 4 * steps**2, 30 * steps**2]
    spread = []
    for share in (1.0, 0.6, 0.2):
        widths = widths_by_cost(shrunk_costs(costs, share), range(0, 256, 16), 256, 160, multiple_of=1)
        assert sum(widths) == 480 and widths == sorted(widths)
        spread.append(widths[-1] - widths[0])
    assert spread[0] > spread[1] > spread[2]
