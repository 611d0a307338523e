"""Pruning on disk equals pruning in memory and saving."""

import json
import os
import shutil

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from transformers import AutoConfig

import gluprune
from gluprune.calibration.collect import calibrate
from gluprune.calibration.statistics import Statistics
from gluprune.checkpoints import load_save, write
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io import atomic
from gluprune.io.shards import SINGLE_FILE
from gluprune.models.families import FAMILIES
from gluprune.pruning.scores import STATIC_SCORES
from tests.helpers.marks import each_family, slow
from tests.helpers.streaming import (
    LAYERS,
    WIDTH,
    assert_same_config,
    assert_same_tensors,
    contents,
    reshard,
    stored,
    tiny_model,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def in_memory(source, destination, **arguments):
    model = load_save.load(source)
    report = gluprune.prune(model, **arguments)
    load_save.save(model, destination)
    return report


@pytest.mark.parametrize("score", ["maw_gud", *slow(*(score for score in STATIC_SCORES if score != "maw_gud"))])
@pytest.mark.parametrize("family", each_family())
def test_equals_pruning_in_memory(tmp_path, family, score, monkeypatch):
    monkeypatch.setattr(atomic, "fsync", lambda descriptor: None)  # slow, and flushing is tested elsewhere
    source = tmp_path / "source"
    tiny_model(family, DTYPES[len(family + score) % 3], seed=len(score)).save_pretrained(source)
    reshard(source, 3, seed=len(family))
    arguments = dict(pruning_ratio=0.4, score=score, multiple_of=1)
    expected = in_memory(source, tmp_path / "expected", **arguments)
    report = prune_checkpoint(source, tmp_path / "out", **arguments)

    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    assert_same_config(tmp_path / "out", tmp_path / "expected")
    assert {layer: kept.tolist() for layer, kept in report.kept.items()} == expected.to_dict()["kept"]
    ours, theirs = report.to_dict(), expected.to_dict()
    assert {key: ours[key] for key in theirs} == theirs


def calibrated(source, file, gram=True, layers=None):
    ids = torch.randint(1, 40, (3, 40), generator=torch.Generator().manual_seed(0))
    calibrate(load_save.load(source), [ids], gram=gram, layers=layers).save(file)
    return file


CALIBRATED = [(family, "hybrid", True) for family in FAMILIES] + [
    ("phi3", "activation", False),
    ("llama", "activation", False),
    ("llama", "hybrid", False),
    ("llama", "maw", True),
]


@pytest.mark.parametrize("family, score, compensate", CALIBRATED)
def test_pruning_with_statistics_equals_calibrated_pruning_in_memory(tmp_path, family, score, compensate, monkeypatch):
    monkeypatch.setattr(atomic, "fsync", lambda descriptor: None)  # slow, and flushing is tested elsewhere
    source = tmp_path / "source"
    tiny_model(family, DTYPES[len(family + score) % 3], seed=len(score)).save_pretrained(source)
    reshard(source, 3, seed=len(family))
    file = calibrated(source, tmp_path / "statistics", gram=compensate)
    arguments = dict(pruning_ratio=0.4, score=score, multiple_of=1, compensate=compensate)
    expected = in_memory(source, tmp_path / "expected", calibration=Statistics.load(file), **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(write, "_BLOCK_BYTES", 777)
        report = prune_checkpoint(source, tmp_path / "out", statistics=file, **arguments)
    assert {layer: kept.tolist() for layer, kept in report.kept.items()} == expected.to_dict()["kept"]
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    assert_same_config(tmp_path / "out", tmp_path / "expected")
    if compensate:
        used = None if score == "maw" else file
        plain = prune_checkpoint(source, tmp_path / "plain", statistics=used, **{**arguments, "compensate": False})
        assert plain.to_dict()["kept"] == report.to_dict()["kept"]
        before, after = stored(tmp_path / "plain"), stored(tmp_path / "out")
        changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
        assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(LAYERS)}


def test_statistics_that_do_not_match(llama, tmp_path):
    def refused(message, **arguments):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises((ValueError, OSError), match=message):
            prune_checkpoint(llama, tmp_path / "out", **{"intermediate_size": 20, "multiple_of": 1, **arguments})
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    some = calibrated(llama, tmp_path / "some", gram=False, layers=[0, 2])
    refused(r"no layer 1: they have layers \[0, 2\]", score="hybrid", statistics=some)
    refused("need.* statistics with Gram matrices", compensate=True, layers=[0], statistics=some)
    refused("absent", compensate=True, statistics=tmp_path / "absent")
    refused("holds no calibration statistics", score="hybrid", statistics=llama / SINGLE_FILE)
    refused("config.json is not a complete safetensors file", score="hybrid", statistics=llama / "config.json")
    refused("score='hybrid' needs calibration statistics", score="hybrid")
    refused("compensate=True needs calibration statistics", compensate=True)
    with pytest.raises(TypeError, match="compensate must be True or False"):
        prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1, compensate=1)
    prune_checkpoint(llama, tmp_path / "narrow", intermediate_size=20, multiple_of=1)
    other = calibrated(tmp_path / "narrow", tmp_path / "other")
    refused("layer 0 has 52 neurons, but the statistics were collected at 20", score="hybrid", statistics=other)
    refused("statistics would be ignored: score='maw_gud' uses no calibration data", statistics=some)
    refused("dry_run=True writes nothing", dry_run=True, resume=True)


def test_other_statistics_do_not_resume(llama, tmp_path, monkeypatch):
    """A partial output of one calibration is not used for another."""
    arguments = dict(intermediate_size=20, multiple_of=1, score="activation", statistics=tmp_path / "statistics")
    calibrated(llama, tmp_path / "statistics", gram=False)

    def interrupted(path, target):
        if path.name == "checkpoint":
            raise KeyboardInterrupt
        os.rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "rename", interrupted)
        prune_checkpoint(llama, tmp_path / "out", **arguments)
    (first,) = tmp_path.glob(".out.*.partial")
    statistics = Statistics.load(tmp_path / "statistics")
    for layer in statistics.layers.values():
        layer.squares = layer.squares.flip(0).contiguous()
    statistics.save(tmp_path / "statistics")
    report = prune_checkpoint(llama, tmp_path / "out", resume=True, **arguments)
    (saved,) = (first / "selections").iterdir()
    assert report.kept[0].tolist() != json.loads(saved.read_text())["0"]


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(list(FAMILIES)),
    score=st.sampled_from(list(STATIC_SCORES)),
    dtype=st.sampled_from(DTYPES),
    tied=st.booleans(),
    shards=st.integers(0, 6),
    width=st.integers(1, WIDTH - 1),
    layers=st.none() | st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted),
    block=st.sampled_from([1, 100, 777, 1 << 21]),
    seed=st.integers(0, 10**6),
)
def test_any_sharding(tmp_path_factory, family, score, dtype, tied, shards, width, layers, block, seed):
    folder = tmp_path_factory.mktemp("sharding")
    source, arguments = folder / "source", dict(intermediate_size=width, score=score, multiple_of=1, layers=layers)
    model = tiny_model(family, dtype, seed, tie_word_embeddings=tied)
    model.save_pretrained(source)
    if shards:
        reshard(source, shards, seed)
    before = contents(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_BLOCK_BYTES", block)
        patch.setattr(atomic, "fsync", lambda descriptor: None)  # slow, and flushing is tested elsewhere
        prune_checkpoint(source, folder / "out", **arguments)
    gluprune.prune(model, **arguments)
    expected, actual = model.state_dict(), stored(folder / "out")
    if "lm_head.weight" not in actual:
        assert model.config.tie_word_embeddings
        del expected["lm_head.weight"]
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
    assert load_save.layer_widths(AutoConfig.from_pretrained(folder / "out")) == load_save.layer_widths(model.config)
    assert contents(source) == before
    assert sorted(p.name for p in folder.iterdir()) == ["out", "source"]
    shutil.rmtree(folder)


def test_selection_against_float64(llama, tmp_path):
    """The paper's criterion, computed here in float64 from the stored weights."""
    before = stored(llama)
    report = prune_checkpoint(llama, tmp_path / "out", pruning_ratio=0.3, multiple_of=1, score="maw")
    after = stored(tmp_path / "out")
    width = WIDTH - int(0.3 * WIDTH)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp."
        gate, up = (before[f"{prefix}{name}.weight"].double() for name in ("gate_proj", "up_proj"))
        scores = sum(w.max(1).values + w.min(1).values.abs() for w in (gate, up))
        kept = scores.argsort(descending=True)[:width].sort().values
        assert kept.tolist() == report.kept[layer].tolist()
        for name, tensor in before.items():
            if name.startswith(prefix):
                index = (slice(None), kept) if name == f"{prefix}down_proj.weight" else kept
                expected = tensor if name == f"{prefix}down_proj.bias" else tensor[index]
                assert torch.equal(after[name], expected), name
