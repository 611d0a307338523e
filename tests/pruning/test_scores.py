"""Scores compared with float64 formulas, and with OptiPFair on the real model."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gluprune
from csrc_triton.scores import kernel
from gluprune.models.glu import model_glus
from gluprune.pruning.scores import STATIC_SCORES, WeightStatistics, static_score
from gluprune.runtime import operator


def ppm(weight):
    return weight.max(dim=1).values + weight.min(dim=1).values.abs()


TRUTH = {
    "maw": lambda g, u, d: ppm(g) + ppm(u),
    "ppm": lambda g, u, d: ppm(g) + ppm(u),
    "maw_gud": lambda g, u, d: ppm(g) + ppm(u) + ppm(d.T),
    "vow": lambda g, u, d: g.var(dim=1, correction=1) + u.var(dim=1, correction=1),
    "pon": lambda g, u, d: g.abs().sum(dim=1) * u.abs().sum(dim=1),
    "l2": lambda g, u, d: g.square().sum(dim=1).sqrt() + u.square().sum(dim=1).sqrt(),
}


@settings(deadline=None)
@given(
    st.integers(1, 70),
    st.integers(2, 90),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(list(TRUTH)),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_formulas(neurons, hidden, dtype, name, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(neurons, hidden, generator=generator).add(0.1).to(dtype) for _ in range(2))
    down = torch.randn(hidden, 2 * neurons, generator=generator).to(dtype)
    down = down[:, ::2] if strided else down[:, :neurons]
    scores = static_score(name, gate, up, down)
    assert scores.dtype == torch.float32 and scores.shape == (neurons,)
    expected = TRUTH[name](gate.double(), up.double(), down.double())
    torch.testing.assert_close(scores.double(), expected, rtol=2e-6, atol=0)


def test_every_score_has_a_reference():
    assert TRUTH.keys() == STATIC_SCORES.keys()


def test_rows_beyond_one_block():
    weight = torch.randn(2500, 3)
    torch.testing.assert_close(
        static_score("l2", weight, weight, weight.T).double(), 2 * weight.double().norm(dim=1), rtol=2e-6, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PPM", "VOW", "PON", "L2"])
def test_same_neurons_and_weights_as_optipfair(smollm2, name):
    """Ratios 10 ... 60 % in all 30 layers: the same neurons are kept, and pruned weights are bit-equal."""
    import optipfair

    logging.disable(logging.INFO)
    for percent in range(10, 70, 10):
        theirs = optipfair.prune_model(
            copy.deepcopy(smollm2), neuron_selection_method=name, pruning_percentage=percent, show_progress=False
        )
        ours = copy.deepcopy(smollm2)
        report = gluprune.prune(ours, pruning_ratio=percent / 100, score=name.lower(), multiple_of=1)
        assert len(report.kept) == 30
        expected = theirs.state_dict()
        for key, tensor in ours.state_dict().items():
            assert torch.equal(tensor, expected[key]), (name, percent, key)
        for index, layer in enumerate(smollm2.model.layers):
            kept = report.kept[index]
            assert torch.equal(layer.mlp.gate_proj.weight[kept], theirs.model.layers[index].mlp.gate_proj.weight)
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_kernel_on_the_real_model(smollm2, monkeypatch):
    """The kernel's statistics in all 30 layers: peak-to-peak magnitudes bit-equal to torch, scores within 2e-6."""
    if operator.INTERPRETED:  # fewer, larger programs, since the interpreter's time depends on their number
        monkeypatch.setattr(kernel, "BLOCK_ROWS", 256)
        monkeypatch.setattr(kernel, "BLOCK_COLUMNS", 512)
        monkeypatch.setattr(kernel, "BLOCK_COLUMN_ROWS", 512)
    for glu in model_glus(smollm2):
        weights = glu.weights()
        found = kernel.neuron_scores(*weights, kernel.NeuronStatistics._fields)
        expected = WeightStatistics(*weights)
        for field in ("gate_ppm", "up_ppm", "down_ppm"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), field
        for name, (fields, formula) in STATIC_SCORES.items():
            truth = TRUTH[name](*(weight.double() for weight in weights))
            score = formula(*(getattr(found, field) for field in fields))
            torch.testing.assert_close(score.double(), truth, rtol=2e-6, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("name", list(STATIC_SCORES))
def test_same_neurons_on_cuda_as_on_the_cpu(tiny_model, name):
    model = tiny_model(seed=6, hidden_size=576, intermediate_size=1536)  # the sizes of SmolLM2-135M
    on_cpu = gluprune.prune(copy.deepcopy(model), pruning_ratio=0.4, score=name)
    on_cuda = gluprune.prune(model.cuda(), pruning_ratio=0.4, score=name)
    for index, kept in on_cpu.kept.items():
        assert torch.equal(kept, on_cuda.kept[index])


def test_prune_uses_the_kernel_where_it_runs(tiny_model, monkeypatch):
    """If the kernel is allowed on this device, as on CUDA, `prune` calls it and keeps the same neurons."""
    calls = []
    original = kernel.neuron_scores
    device = "cpu" if operator.INTERPRETED else "cuda"
    expected = gluprune.prune(tiny_model(seed=5), pruning_ratio=0.4, multiple_of=1)
    monkeypatch.setattr(operator, "uses_kernels", lambda backend, device: True)
    monkeypatch.setattr(kernel, "neuron_scores", lambda *args: calls.append(1) or original(*args))
    found = gluprune.prune(tiny_model(seed=5).to(device), pruning_ratio=0.4, multiple_of=1)
    assert len(calls) == 3
    for index, kept in expected.kept.items():
        assert torch.equal(kept, found.kept[index])
