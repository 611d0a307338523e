"""Pruning with calibration data."""

import copy
import errno
import logging
import os
from importlib.resources import files

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import gluprune
from gluprune.calibration import collect
from gluprune.calibration import statistics as calibration_module
from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.collect import calibrate, calibrate_in_passes, calibrate_to_file, plan_passes
from gluprune.calibration.statistics import Statistics
from gluprune.io import atomic
from gluprune.models.glu import model_glus
from gluprune.pruning import prune as pruning_module
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import patch
from tests.helpers.calibrations import arguments, captured, random_batches
from tests.helpers.tiny_models import make_tiny_model

GIB = 1 << 30


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_activation_score_and_refitted_weights(family):
    """End to end: kept neurons and down projections equal those computed from X in float64."""
    model, batches = make_tiny_model(family, seed=9), random_batches([(7, 40)] * 3)
    before = [glu.weights()[2].double() for glu in model_glus(model)]
    biases = [None if glu.down.bias is None else glu.down.bias.detach().clone() for glu in model_glus(model)]
    xs = captured(model, [sequence for batch in batches for sequence in batch])
    report = gluprune.prune(
        model, pruning_ratio=0.4, multiple_of=1, score="activation", calibration=batches, compensate=True
    )
    assert report.score == "activation"
    for layer, (glu, x, down, bias) in enumerate(zip(model_glus(model), xs, before, biases)):
        scores = x.norm(dim=0) * down.norm(dim=0)
        kept = report.kept[layer]
        assert torch.equal(kept, scores.topk(61).indices.sort().values)
        ridge = (0.01 * x.square().sum(0).mean()) ** 0.5
        rows = torch.cat([x[:, kept], ridge * torch.eye(61, dtype=torch.float64)])
        values = torch.cat([x @ down.T, ridge * down.T[kept]])
        expected = torch.linalg.lstsq(rows, values, driver="gelsd").solution.T
        torch.testing.assert_close(glu.weights()[2].double(), expected, rtol=1e-3, atol=1e-4)
        assert (bias is None and glu.down.bias is None) or torch.equal(glu.down.bias, bias)


def test_saved_statistics_give_the_same_models_as_new_passes(tmp_path):
    dense, batches = make_tiny_model(dtype=torch.bfloat16, seed=10), random_batches([(7, 40)] * 2)
    calibrate(dense, batches).save(tmp_path / "statistics.safetensors")
    statistics = Statistics.load(tmp_path / "statistics.safetensors")
    assert statistics.tokens == 2 * 7 * 40
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]
    for width in (91, 81, 71, 61, 50, 40, 30):
        for score in ("hybrid", "activation", "maw_gud"):
            one, other = copy.deepcopy(dense), copy.deepcopy(dense)
            for model, calibration in ((one, statistics), (other, iter(batches))):
                gluprune.prune(
                    model,
                    intermediate_size=width,
                    multiple_of=1,
                    score=score,
                    calibration=calibration,
                    compensate=True,
                )
            for (name, found), expected in zip(one.state_dict().items(), other.state_dict().values()):
                assert torch.equal(found, expected), (width, score, name)


@pytest.mark.slow
def test_same_neurons_as_optipfair(smollm2, smollm2_tokenizer):
    """All 30 layers of the real model, 20 % pruned, on the same DataLoader."""
    optipfair = pytest.importorskip("optipfair")
    text = (files("gluprune.demo") / "data" / "demo_text.txt").read_text(encoding="utf-8")
    ids = torch.cat(batches_from_text(smollm2_tokenizer, text, windows=7, length=48))
    batches = DataLoader(TensorDataset(ids, torch.ones_like(ids)), batch_size=3)
    theirs = copy.deepcopy(smollm2)
    logging.disable(logging.INFO)
    try:
        theirs = optipfair.prune_model(
            theirs, "MLP_GLU", "MAW", pruning_percentage=20, show_progress=False, dataloader=batches
        )
    finally:
        logging.disable(logging.NOTSET)
    dense = [layer.mlp.gate_proj.weight.detach().clone() for layer in smollm2.model.layers]
    report = gluprune.prune(smollm2, pruning_ratio=0.2, multiple_of=1, score="hybrid", calibration=batches)
    for layer, kept in report.kept.items():
        assert torch.equal(dense[layer][kept], theirs.model.layers[layer].mlp.gate_proj.weight), layer
        assert torch.equal(
            smollm2.model.layers[layer].mlp.down_proj.weight, theirs.model.layers[layer].mlp.down_proj.weight
        )


@pytest.mark.parametrize("backend", ["auto", "cublas"])
def test_patched_model(backend):
    batches = random_batches([(2, 40)])
    plain = make_tiny_model(seed=12, dtype=torch.bfloat16)
    patched = patch(copy.deepcopy(plain), backend=backend)
    assert all(status.fused for status in fusion_status(patched)) == (backend == "cublas")
    arguments = {
        "pruning_ratio": 0.3,
        "multiple_of": 1,
        "score": "activation",
        "calibration": batches,
        "compensate": True,
    }
    expected, found = gluprune.prune(plain, **arguments), gluprune.prune(patched, **arguments)
    for layer, kept in expected.kept.items():
        assert torch.equal(found.kept[layer], kept)
    for one, other in zip(model_glus(plain), model_glus(patched)):
        assert torch.equal(one.down.weight, other.down.weight)


CPU, OTHER = torch.device("cpu"), torch.device("meta")


def test_passes_fit_into_half_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(collect, "free_memory", {CPU: 10 * GIB, OTHER: 4 * GIB}.__getitem__)
    assert plan_passes([(index, CPU, 2 * GIB) for index in range(5)]) == [[0, 1], [2, 3], [4]]
    assert plan_passes([(index, CPU, GIB) for index in (3, 4, 7, 8, 9)]) == [[3, 4, 7, 8, 9]]
    assert plan_passes([(0, CPU, 9 * GIB), (1, CPU, GIB), (2, CPU, 4 * GIB), (3, CPU, 1)]) == [[0], [1, 2], [3]]
    two_devices = [(0, CPU, 5 * GIB), (1, OTHER, 2 * GIB), (2, OTHER, 1), (3, CPU, 5 * GIB)]
    assert plan_passes(two_devices) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("grams, passes", [(1, 3), (2, 2), (3, 1), (0.5, 3)])
def test_more_passes_give_the_same_model(monkeypatch, grams, passes):
    one, other = (make_tiny_model(seed=13) for _ in range(2))
    batches = random_batches([(7, 40)])
    arguments = {"pruning_ratio": 0.4, "multiple_of": 1, "score": "hybrid", "compensate": True}
    gluprune.prune(one, calibration=batches, **arguments)
    monkeypatch.setattr(collect, "free_memory", lambda device: 2 * grams * 4 * 101**2)
    held, runs = [], []
    other.model.register_forward_hook(lambda *_: runs.append(1))
    solve = pruning_module.refitted_down
    monkeypatch.setattr(pruning_module, "refitted_down", lambda *args: held.append(args[2].shape) or solve(*args))
    gluprune.prune(other, calibration=iter(batches), **arguments)
    assert len(runs) == passes and held == [(101, 101)] * 3
    for (name, found), expected in zip(other.state_dict().items(), one.state_dict().values()):
        assert torch.equal(found, expected), name


def test_only_one_pass_keeps_its_grams(monkeypatch):
    """The Gram matrices of earlier passes are freed before the next pass."""
    monkeypatch.setattr(collect, "free_memory", lambda device: 2 * 4 * 101**2)
    alive = []
    empty = calibration_module.LayerStatistics.empty.__func__

    def counted(cls, glu, gram):
        import gc

        alive.append(sum(type(o) is torch.Tensor and o.shape == (101, 101) for o in gc.get_objects()))
        return empty(cls, glu, gram=gram)

    monkeypatch.setattr(calibration_module.LayerStatistics, "empty", classmethod(counted))
    for _, statistics in calibrate_in_passes(
        make_tiny_model(seed=14), random_batches(), gram=True, sensitivity=False, layers=[0, 1, 2]
    ):
        del statistics
    assert alive == [0, 0, 0]


IDS = torch.full((2, 5), 7)


@pytest.mark.parametrize(
    "given, error, message",
    [
        (arguments(), ValueError, "score='hybrid' needs calibration data"),
        (arguments(score="activation"), ValueError, "score='activation' needs calibration data"),
        (arguments(score="maw", compensate=True), ValueError, "compensate=True needs calibration data"),
        (arguments(compensate=1, calibration=[IDS]), TypeError, "compensate must be True or False, got 1"),
        (arguments(calibration=[]), ValueError, "calibration holds no tokens"),
        (arguments(calibration=[(IDS, IDS * 0)]), ValueError, "calibration holds no tokens"),
        (arguments(calibration=5), TypeError, "calibration must be an iterable of batches, got int"),
        (arguments(calibration="text"), TypeError, "calibration batch 0 must be a tensor.* got str"),
        (arguments(calibration=IDS), TypeError, r"got one batch \(Tensor\): put it into a list"),
        (arguments(calibration={"input_ids": IDS}), TypeError, r"got one batch \(dict\): put it into a list"),
        (arguments(calibration=[IDS[0]]), ValueError, r"batch 0 must hold .* got torch.int64 of shape \[5\]"),
        (arguments(calibration=[IDS, IDS.float()]), ValueError, "batch 1 must hold .* got torch.float32"),
        (arguments(calibration=[IDS, IDS.bool()]), ValueError, "batch 1 must hold .* got torch.bool"),
        (arguments(calibration=[{"ids": IDS}]), ValueError, "batch 0 is a dict without input_ids: its keys are ids"),
        (arguments(calibration=[{"input_ids": [[7, 7]]}]), TypeError, "batch 0 must be a tensor.* got list"),
        (arguments(calibration=[(IDS, IDS[:1])]), ValueError, r"calibration batch 0 must have the shape .* \[1, 5\]"),
        (arguments(calibration=[(IDS, "mask")]), ValueError, "calibration batch 0 must have the shape .* got str"),
        (arguments(calibration=[(IDS, IDS)]), ValueError, r"batch 0 must hold 1 \(a token\) .* labels are not a mask"),
        (arguments(calibration=[(IDS, IDS * 0 - 100)]), ValueError, "labels are not a mask"),
        *(
            (
                arguments(calibration=[{"input_ids": IDS, name: IDS}]),
                ValueError,
                f"batch 0 has {name}: .* passes on only",
            )
            for name in ("inputs_embeds", "position_ids", "pixel_values", "pixel_values_videos")
        ),
        (arguments(calibration=[IDS + 57]), ValueError, "calibration batch 0 has token ids from 64 to 64"),
        (arguments(calibration=[IDS - 8]), ValueError, "calibration batch 0 has token ids from -1 to -1"),
    ],
)
def test_bad_input_changes_nothing(tiny_model, unchanged, given, error, message):
    model = tiny_model()
    with unchanged(model), pytest.raises(error, match=message):
        gluprune.prune(model, **given)


OTHER_WEIGHTS = "the calibration statistics were collected with other weights of {} of 3 layers"


def test_statistics_of_other_weights_get_a_warning(tiny_model, tmp_path, caplog):
    """Whether in memory or on disk, in whatever dtype; weights of layers that are not pruned do not matter."""
    model, other = tiny_model(seed=1, dtype=torch.bfloat16), tiny_model(seed=2)
    statistics = calibrate(copy.deepcopy(model).float(), [IDS])
    statistics.save(tmp_path / "statistics")
    model.save_pretrained(tmp_path / "model")
    given = arguments(calibration=Statistics.load(tmp_path / "statistics"))
    on_disk = {key: value for key, value in given.items() if key != "calibration"}
    for dtype in (torch.bfloat16, torch.float32):
        gluprune.prune(copy.deepcopy(model).to(dtype), **given)
        copied = copy.deepcopy(model).to(dtype)
        gluprune.prune(copied, **given, layers=[1])
        gluprune.prune(copied, **given, layers=[0, 2])
    gluprune.prune_checkpoint(tmp_path / "model", tmp_path / "out", statistics=tmp_path / "statistics", **on_disk)
    precise = tiny_model(seed=3)
    found = calibrate(precise, [IDS])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        gluprune.prune(copy.deepcopy(precise).to(dtype), **{**given, "calibration": found})
    assert "other weights" not in caplog.text
    gluprune.prune(other, **given)
    assert OTHER_WEIGHTS.format(3) in caplog.text
    caplog.clear()
    model.model.layers[1].mlp.down_proj.weight.data[0, 3] += 1
    model.save_pretrained(tmp_path / "changed")
    gluprune.prune_checkpoint(tmp_path / "changed", tmp_path / "out2", statistics=tmp_path / "statistics", **on_disk)
    assert caplog.text.count(OTHER_WEIGHTS.format(1)) == 1


def test_statistics_of_another_model_are_rejected(tiny_model, unchanged):
    model = tiny_model()
    narrow = calibrate(tiny_model(intermediate_size=90), [IDS])
    with (
        unchanged(model),
        pytest.raises(ValueError, match="layer 0 has 101 neurons, but the statistics were collected at 90"),
    ):
        gluprune.prune(model, **arguments(calibration=narrow))
    deep = calibrate(tiny_model(num_hidden_layers=4), [IDS])
    with unchanged(model), pytest.raises(ValueError, match="have layer 3, but the model has 3 layers: they are those"):
        gluprune.prune(model, **arguments(calibration=deep))
    some = calibrate(model, [IDS], layers=[0, 2])
    with unchanged(model), pytest.raises(ValueError, match=r"have no layer 1: they have layers \[0, 2\]"):
        gluprune.prune(model, **arguments(calibration=some))
    without_gram = calibrate(model, [IDS], gram=False)
    with unchanged(model), pytest.raises(ValueError, match="needs statistics with Gram matrices"):
        gluprune.prune(model, **arguments(calibration=without_gram, compensate=True))


@pytest.mark.parametrize("broken", [0, 2])
def test_nan_in_the_activations_names_the_layer(tiny_model, unchanged, broken):
    model = tiny_model("qwen2")
    model.model.layers[broken].mlp.up_proj.bias = None
    with torch.no_grad():
        model.model.layers[broken].mlp.up_proj.weight[50] = torch.inf
    model.model.layers[broken].mlp.up_proj.weight.requires_grad_(False)
    with unchanged(model), pytest.raises(ValueError, match=f"layer {broken} has NaN or Inf .* batch 0"):
        gluprune.prune(model, **arguments(calibration=[IDS]))


def test_failure_while_replacing_changes_nothing(tiny_model, unchanged, monkeypatch):
    model, count = tiny_model("qwen2"), iter(range(10))
    replace = pruning_module.replace_down

    def fails_at_the_third(*args):
        replace(*args)
        if next(count) == 2:
            raise MemoryError("no more")

    monkeypatch.setattr(pruning_module, "replace_down", fails_at_the_third)
    with unchanged(model), pytest.raises(MemoryError):
        gluprune.prune(model, **arguments(calibration=[IDS], compensate=True))


@pytest.mark.parametrize("score", ["maw", lambda gate, up, down: gate.sum(1)], ids=["maw", "callable"])
@pytest.mark.parametrize("unused", ["batches", "statistics"])
def test_calibration_that_would_be_ignored_is_refused(tiny_model, unchanged, score, unused):
    """Before it is looked at."""
    model = tiny_model(seed=15)
    calibration = iter(lambda: 1 / 0, 1) if unused == "batches" else Statistics({}, 0)
    with (
        unchanged(model),
        pytest.raises(ValueError, match="calibration would be ignored: score=.* uses no calibration"),
    ):
        gluprune.prune(model, **arguments(score=score, calibration=calibration))


def test_bad_statistics_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Statistics.load(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no calibration statistics"):
        Statistics.load(tmp_path / "other")


def test_statistics_written_in_passes_equal_those_of_one_pass(tmp_path, monkeypatch):
    model = make_tiny_model(seed=16)
    for sensitivity in (False, True):
        calibrate(model, random_batches(), sensitivity=sensitivity).save(tmp_path / "one")
        with monkeypatch.context() as patch:
            patch.setattr(collect, "free_memory", lambda device: 2 * 4 * 101**2)  # one layer at a time
            calibrate_to_file(
                model, random_batches(), tmp_path / "passes", gram=True, sensitivity=sensitivity, texts={}
            )
        assert (tmp_path / "one").read_bytes() == (tmp_path / "passes").read_bytes()
        (tmp_path / "passes").unlink()


def test_statistics_keep_the_fingerprints_of_their_texts(tmp_path):
    statistics = calibrate(make_tiny_model(seed=16), [IDS], gram=False)
    statistics.texts = {"a.txt": "12", "é.txt": "34"}
    statistics.save(tmp_path / "statistics")
    assert Statistics.load(tmp_path / "statistics").texts == statistics.texts


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "statistics.safetensors"
    statistics = calibrate(make_tiny_model(seed=16), [IDS], gram=False)
    statistics.save(path)
    before = path.read_bytes()

    def half_a_write(descriptor, data):
        os.write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(atomic, "write", half_a_write)
    with pytest.raises(OSError, match="disk full"):
        statistics.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
