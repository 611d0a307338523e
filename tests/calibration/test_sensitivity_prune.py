"""Pruning with sensitivities: passes, allocation, bad input."""

import copy
import json
import os

import pytest
import torch

import gluprune
from gluprune.calibration.collect import calibrate
from gluprune.calibration.sensitivity import (
    removed_counts,
)
from gluprune.calibration.statistics import Statistics
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io import atomic
from gluprune.models.glu import model_glus
from gluprune.pruning.prune import prune
from gluprune.pruning.widths import shrunk_costs, widths_by_cost
from tests.helpers.sensitivities import choose_labels, random_batches
from tests.helpers.tiny_models import make_tiny_model


def test_text_instead_of_statistics():
    arguments = dict(pruning_ratio=0.5, multiple_of=1, score="surgeon")
    statistics = calibrate(make_tiny_model(seed=1), random_batches(), sensitivity=True)
    expected = prune(make_tiny_model(seed=1), **arguments, calibration=statistics).kept
    found = prune(make_tiny_model(seed=1), **arguments, calibration=random_batches()).kept
    assert all(torch.equal(found[layer], kept) for layer, kept in expected.items())


def test_more_passes_give_the_same_neurons(monkeypatch):
    whole, passes = make_tiny_model(seed=1), make_tiny_model(seed=1)
    arguments = dict(pruning_ratio=0.5, multiple_of=1, score="surgeon", compensate=True, calibration=random_batches())
    report = prune(whole, **arguments)
    monkeypatch.setattr("gluprune.calibration.collect.free_memory", lambda device: 4 * 101**2)
    again = prune(passes, **arguments)
    assert {layer: kept.tolist() for layer, kept in report.kept.items()} == {
        layer: kept.tolist() for layer, kept in again.kept.items()
    }


def sensitive(model, **arguments):
    return calibrate(model, random_batches(((8, 40),)), sensitivity=True, **arguments)


@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_surgeon_by_layer(family, multiple_of, tmp_path):
    model = make_tiny_model(family, seed=4, intermediate_size=96)
    with torch.no_grad():  # one layer has almost no effect
        model_glus(model)[1].down.weight.mul_(0.01)
    statistics, glus = sensitive(model), model_glus(model)
    before = [[weight.detach().clone() for weight in glu.weights()] for glu in glus]
    report = prune(
        model,
        intermediate_size=64,
        multiple_of=multiple_of,
        score="surgeon",
        allocation="sensitivity",
        compensate=True,
        calibration=statistics,
    )
    widths = [report.widths[layer] for layer in range(3)]
    assert sum(widths) == 3 * 64 and widths[1] == min(widths) < min(widths[0], widths[2])
    assert all(width % multiple_of == 0 for width in widths)
    costs = [statistics.layers[layer].costs for layer in range(3)]
    expected, taken_as_they_are = (
        widths_by_cost(of, removed_counts(96), 96, 64, multiple_of=multiple_of)
        for of in (shrunk_costs(costs, 64 / 96), costs)
    )
    assert widths == expected
    assert max(widths) - min(widths) <= max(taken_as_they_are) - min(taken_as_they_are)
    assert [glu.intermediate_size for glu in glus] == widths == [len(report.kept[layer]) for layer in range(3)]
    for index, (gate, up, _) in enumerate(before):
        kept = statistics.layers[index].saliency.topk(widths[index]).indices.sort().values
        assert torch.equal(report.kept[index], kept)
        assert torch.equal(glus[index].weights()[0], gate[kept]) and torch.equal(glus[index].weights()[1], up[kept])
    assert f"96 -> 64 neurons in 3 layers on average, {min(widths)} to {max(widths)} per layer" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["widths"] == {
        str(layer): width for layer, width in report.widths.items()
    }
    ids = random_batches()[0]
    gluprune.save(model, tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(gluprune.load(tmp_path / "pruned")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_saved_statistics_and_the_disk(family, tmp_path):
    """Pruning on disk equals pruning in memory bit for bit, with one width or a width per layer."""
    model = make_tiny_model(family, dtype=torch.bfloat16, seed=4)
    with torch.no_grad():  # one layer has almost no effect
        model_glus(model)[2].down.weight.mul_(0.01)
    model.save_pretrained(tmp_path / "model")
    statistics = sensitive(model)
    statistics.save(tmp_path / "statistics")
    for layer, loaded in Statistics.load(tmp_path / "statistics").layers.items():
        assert torch.equal(loaded.saliency, statistics.layers[layer].saliency)
        assert torch.equal(loaded.costs, statistics.layers[layer].costs)
    for allocation in ("uniform", "sensitivity"):
        for score in ("surgeon", "maw"):
            arguments = dict(
                expansion_ratio=2.0, multiple_of=4, score=score, compensate=True, layers=[0, 2], allocation=allocation
            )
            pruned, out = copy.deepcopy(model), tmp_path / f"{score}-{allocation}"
            kept = prune(pruned, **arguments, calibration=statistics).widths
            planned = prune_checkpoint(
                tmp_path / "model", out, **arguments, statistics=tmp_path / "statistics", dry_run=True
            )
            report = prune_checkpoint(tmp_path / "model", out, **arguments, statistics=tmp_path / "statistics")
            assert report.widths == planned.widths == kept
            assert (kept[0] > kept[2]) == (allocation == "sensitivity")
            loaded = gluprune.load(out)
            for name, weight in pruned.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], weight), name


def test_another_allocation_does_not_resume(tmp_path, monkeypatch):
    """A partial output with one width is not used for an output with a width per layer."""
    model = make_tiny_model(seed=4)
    with torch.no_grad():  # one layer has almost no effect
        model_glus(model)[2].down.weight.mul_(0.01)
    model.save_pretrained(tmp_path / "model")
    sensitive(model).save(tmp_path / "statistics")
    arguments = dict(pruning_ratio=0.4, multiple_of=1, score="surgeon", statistics=tmp_path / "statistics")
    rename = os.rename

    def interrupted(path, target):
        if path.name == "checkpoint":
            raise KeyboardInterrupt
        rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "rename", interrupted)
        prune_checkpoint(tmp_path / "model", tmp_path / "out", **arguments)
    report = prune_checkpoint(tmp_path / "model", tmp_path / "out", **arguments, allocation="sensitivity", resume=True)
    assert len(set(report.widths.values())) > 1
    assert [len(kept) for kept in report.kept.values()] == list(report.widths.values())
    assert [glu.intermediate_size for glu in model_glus(gluprune.load(tmp_path / "out"))] == list(
        report.widths.values()
    )


BAD = {
    "unknown allocation": ({"allocation": "by size"}, "unknown allocation 'by size'; allowed: uniform, sensitivity"),
    "no data": ({"allocation": "sensitivity"}, "allocation='sensitivity' needs calibration data"),
    "batches": (
        {"allocation": "sensitivity", "calibration": random_batches()},
        "allocation='sensitivity' needs Statistics",
    ),
    "too narrow": (
        {"allocation": "sensitivity", "intermediate_size": 8},
        "layers with fewer than 13 of their 101 neurons",
    ),
    "no sensitivities": ({"score": "surgeon"}, r"calibrate\(\.\.\., sensitivity=True\)"),
    "no sensitivities to allocate by": ({"allocation": "sensitivity"}, r"calibrate\(\.\.\., sensitivity=True\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case, unchanged):
    given, message = BAD[case]
    model = make_tiny_model(seed=1)
    if case == "too narrow":
        given = {**given, "calibration": sensitive(model)}
    if case.startswith("no sensitivities"):
        given = {**given, "calibration": calibrate(model, random_batches())}
    target = {} if "intermediate_size" in given else {"pruning_ratio": 0.5}
    with unchanged(model), pytest.raises(ValueError, match=message):
        prune(model, **target, multiple_of=1, **given)


def test_unknown_allocation_is_reported_before_a_download(tmp_path):
    with pytest.raises(ValueError, match="unknown allocation 'by size'; allowed: uniform, sensitivity"):
        prune_checkpoint("nobody/nothing", tmp_path / "out", pruning_ratio=0.5, allocation="by size")


def test_sensitivities_need_gram_matrices(unchanged):
    model = make_tiny_model()
    with unchanged(model), pytest.raises(ValueError, match="sensitivity=True needs gram=True"):
        calibrate(model, random_batches(), gram=False, sensitivity=True)


def test_no_gradient_is_computed_unless_requested(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("ran backward"))
    layer = calibrate(make_tiny_model(), random_batches()).layers[0]
    assert layer.saliency is None and layer.costs is None


@pytest.mark.cuda
def test_same_sensitivities_on_cuda_as_on_the_cpu(monkeypatch):
    choose_labels(monkeypatch, lambda p: torch.arange(len(p)) * 7 % 64)
    model = make_tiny_model(seed=4)
    expected, found = sensitive(model), sensitive(copy.deepcopy(model).cuda())
    for index, layer in found.layers.items():
        assert layer.saliency.is_cuda and layer.costs.is_cuda
        torch.testing.assert_close(layer.saliency.cpu(), expected.layers[index].saliency, rtol=1e-2, atol=0)
        torch.testing.assert_close(layer.costs.cpu(), expected.layers[index].costs, rtol=1e-2, atol=1e-9)
    arguments = dict(pruning_ratio=0.5, multiple_of=1, score="surgeon", compensate=True, allocation="sensitivity")
    report = prune(copy.deepcopy(model).cuda(), **arguments, calibration=found)
    assert sum(report.widths.values()) == 3 * report.intermediate_size
