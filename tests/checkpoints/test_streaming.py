"""Pruning on the disk: equal to pruning in memory and saving, complete, and small in memory."""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap

import huggingface_hub
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import gluprune
from gluprune.calibration.collect import calibrate
from gluprune.calibration.statistics import Statistics
from gluprune.checkpoints import load_save, write
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io import atomic
from gluprune.io.shards import INDEX_FILE, SINGLE_FILE, read_shard
from gluprune.models.families import FAMILIES
from gluprune.pruning.scores import STATIC_SCORES

HIDDEN, WIDTH, LAYERS = 24, 52, 3
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EXTRA = {
    "llama": {"mlp_bias": True},
    "gemma3_text": {"layer_types": ["full_attention"] * LAYERS},
    "phi3": {"pad_token_id": 0},
}


def tiny_model(model_type, dtype=torch.bfloat16, seed=0, **overrides):
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 40,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            **EXTRA.get(model_type, {}),
            **overrides,
        },
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05)  # biases and norms too
    return model


def load(file):
    """Tensors of a file, not tied to it (the library maps the file, which the tests overwrite)."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def reshard(folder, count, seed):
    """Spread the tensors of a single-file checkpoint over `count` files, at random and in random order."""
    tensors = load(folder / SINGLE_FILE)
    rng = random.Random(seed)
    names = rng.sample(sorted(tensors), len(tensors))
    placed = {name: index if index < count else rng.randrange(count) for index, name in enumerate(names)}
    weight_map = {}
    for index in range(count):
        file = f"part-{index}.safetensors"
        raw_save({name: tensors[name] for name in names if placed[name] == index}, folder / file)
        weight_map |= {name: file for name in names if placed[name] == index}
    (folder / SINGLE_FILE).unlink()
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_save(tensors, file):
    """A safetensors file with the tensors in the order given (the library's own writer sorts them)."""
    header, data = {}, b""
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def stored(folder):
    """All tensors of a checkpoint, read with the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in tensors
            tensors[name] = tensor
    return tensors


def assert_same_tensors(folder, expected_folder):
    actual, expected = stored(folder), stored(expected_folder)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_same_config(folder, expected_folder):
    """As transformers reads them; what its own writer adds does not count."""
    actual, expected = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, expected_folder))
    for document in (actual, expected):
        for key in ("_name_or_path", "transformers_version", "architectures", "dtype"):
            document.pop(key, None)
    assert actual == expected


def contents(folder):
    """Every file with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def in_memory(source, destination, **arguments):
    model = load_save.load(source)
    report = gluprune.prune(model, **arguments)
    load_save.save(model, destination)
    return report


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("score", STATIC_SCORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_pruning_in_memory(tmp_path, family, score, monkeypatch):
    monkeypatch.setattr(atomic, "fsync", lambda descriptor: None)  # slow, and tested elsewhere
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


CALIBRATED = [(family, "hybrid", True) for family in FAMILIES]
CALIBRATED += [
    ("phi3", "activation", False),
    ("llama", "activation", False),
    ("llama", "hybrid", False),
    ("llama", "maw", True),
]


@pytest.mark.parametrize("family, score, compensate", CALIBRATED)
def test_statistics_do_what_calibration_does_in_memory(tmp_path, family, score, compensate, monkeypatch):
    monkeypatch.setattr(atomic, "fsync", lambda descriptor: None)  # slow, and tested elsewhere
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
        plain = prune_checkpoint(source, tmp_path / "plain", statistics=file, **{**arguments, "compensate": False})
        assert plain.to_dict()["kept"] == report.to_dict()["kept"]
        before, after = stored(tmp_path / "plain"), stored(tmp_path / "out")
        changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
        assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(LAYERS)}


def test_statistics_that_do_not_fit(llama, tmp_path):
    def refused(message, **arguments):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises((ValueError, OSError), match=message):
            prune_checkpoint(llama, tmp_path / "out", **{"intermediate_size": 20, "multiple_of": 1, **arguments})
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    some = calibrated(llama, tmp_path / "some", gram=False, layers=[0, 2])
    refused(r"no layer 1: they have \[0, 2\]", score="hybrid", statistics=some)
    refused("need.* statistics with Gram matrices", compensate=True, layers=[0], statistics=some)
    refused("absent", compensate=True, statistics=tmp_path / "absent")
    refused("holds no calibration statistics", score="hybrid", statistics=llama / SINGLE_FILE)
    refused("config.json is no complete safetensors file", score="hybrid", statistics=llama / "config.json")
    refused("score='hybrid' needs calibration statistics", score="hybrid")
    refused("compensate=True needs calibration statistics", compensate=True)
    with pytest.raises(TypeError, match="compensate must be True or False"):
        prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1, compensate=1)
    prune_checkpoint(llama, tmp_path / "narrow", intermediate_size=20, multiple_of=1)
    other = calibrated(tmp_path / "narrow", tmp_path / "other")
    refused("layer 0 has 52 neurons, but the statistics were collected at 20", score="hybrid", statistics=other)
    # A static score looks at none of it.
    prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1, statistics=tmp_path / "absent")
    assert contents(tmp_path / "out") == contents(tmp_path / "narrow")


def test_other_statistics_do_not_resume(llama, tmp_path, monkeypatch):
    """What was written with one calibration is no beginning of a checkpoint with another."""
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
        patch.setattr(atomic, "fsync", lambda descriptor: None)  # slow, and tested elsewhere
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
    """The paper's criterion worked out here, in float64, from the stored weights."""
    before = stored(llama)
    report = prune_checkpoint(llama, tmp_path / "out", pruning_ratio=0.3, multiple_of=1)
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


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_stock_transformers_loads_the_output(tmp_path, family):
    source = tmp_path / "source"
    tiny_model(family, torch.float32).save_pretrained(source)
    reshard(source, 2, seed=1)
    prune_checkpoint(source, tmp_path / "out", expansion_ratio=1.0, multiple_of=4)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert model.config.intermediate_size == HIDDEN

    expected = load_save.load(source)
    gluprune.prune(expected, expansion_ratio=1.0, multiple_of=4)
    tokens = torch.arange(10).view(1, 10)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_layers_of_different_widths_load_and_prune_again(llama, tmp_path):
    prune_checkpoint(llama, tmp_path / "first", intermediate_size=20, multiple_of=1, layers=[1])
    prune_checkpoint(tmp_path / "first", tmp_path / "second", intermediate_size=12, multiple_of=1, layers=[0, 2])
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["intermediate_size"] == 20
    assert config["per_layer_config"] == {"0": {"intermediate_size": 12}, "2": {"intermediate_size": 12}}
    load_save.load(tmp_path / "second")
    with pytest.raises(ValueError, match=r"different widths \[12, 20\]"):
        prune_checkpoint(tmp_path / "second", tmp_path / "third", intermediate_size=4, multiple_of=1)
    # Back to one width, the per-layer form goes.
    prune_checkpoint(tmp_path / "second", tmp_path / "third", intermediate_size=12, multiple_of=1, layers=[1])
    config = json.loads((tmp_path / "third" / "config.json").read_text())
    assert config["intermediate_size"] == 12 and "per_layer_config" not in config


def test_config_keeps_what_it_says_otherwise(llama, tmp_path):
    file = llama / "config.json"
    config = json.loads(file.read_text()) | {"transformers_version": "4.40.0", "made_by": "somebody é"}
    file.write_text(json.dumps(config))
    prune_checkpoint(llama, tmp_path / "out", intermediate_size=16, multiple_of=1)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"intermediate_size": 16}


def test_mixed_dtypes_stay_aligned(llama, tmp_path):
    tensors = load(llama / SINGLE_FILE)
    tensors = {name: t.float() if "norm" in name else t for name, t in tensors.items()}
    tensors["model.steps"] = torch.tensor(7)
    raw_save(tensors, llama / SINGLE_FILE)
    prune_checkpoint(llama, tmp_path / "out", intermediate_size=11, multiple_of=1)
    shard = read_shard(tmp_path / "out" / SINGLE_FILE)
    assert all(tensor.offset % tensor.itemsize == 0 for tensor in shard.tensors)
    after = load_file(tmp_path / "out" / SINGLE_FILE)
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert after[name].dtype == tensor.dtype
        assert ".mlp." in name or torch.equal(after[name], tensor)


def test_metadata_and_index(llama, tmp_path):
    save_file(load(llama / SINGLE_FILE), llama / SINGLE_FILE, metadata={"format": "pt", "note": "kept"})
    prune_checkpoint(llama, tmp_path / "single", intermediate_size=11, multiple_of=1)
    with safe_open(tmp_path / "single" / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    assert not (tmp_path / "single" / INDEX_FILE).exists()

    reshard(llama, 4, seed=0)
    report = prune_checkpoint(llama, tmp_path / "sharded", intermediate_size=11, multiple_of=1)
    index = json.loads((tmp_path / "sharded" / INDEX_FILE).read_text())
    tensors = stored(tmp_path / "sharded")
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    assert report.parameters == index["metadata"]["total_parameters"]
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "sharded" / file, "pt") as shard:
            assert name in shard.keys()


def test_tied_head_in_the_file_counts_once(tmp_path):
    source = tmp_path / "source"
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(source)
    tensors = load(source / SINGLE_FILE)
    raw_save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, source / SINGLE_FILE)
    report = prune_checkpoint(source, tmp_path / "out", intermediate_size=20, multiple_of=1)
    assert report.original_parameters == sum(p.numel() for p in model.parameters())
    assert report.parameters == sum(p.numel() for p in load_save.load(tmp_path / "out").parameters())


def test_other_files_come_along_and_other_weights_do_not(llama, tmp_path):
    copied = ["tokenizer.json", "chat_template.jinja", "modeling_custom.py", "additional_chat_templates/tool.jinja"]
    skipped = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "a.GGUF", "params.json"]
    skipped += [".gitattributes", "original/consolidated.00.pth"]
    for name in copied + skipped + [".git/config"]:
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_bytes(os.urandom(3000))
    (llama / INDEX_FILE).write_text("stale: a single file stands beside it")
    report = prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1)
    after = contents(tmp_path / "out")
    assert set(after) == {*copied, "config.json", "generation_config.json", SINGLE_FILE}
    assert all(after[name] == (llama / name).read_bytes() for name in [*copied, "generation_config.json"])
    assert set(report.skipped) == {*skipped, ".git/", INDEX_FILE}
    assert report.files == {name: len(data) for name, data in after.items()}
    assert "pytorch_model.bin" in str(report)


def test_links_are_followed(llama, tmp_path):
    """A folder of the Hub cache holds links to blobs."""
    blobs = tmp_path / "blobs"
    llama.rename(blobs)
    llama.mkdir()
    for file in blobs.iterdir():
        (llama / file.name).symlink_to(file)
    prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1)
    prune_checkpoint(blobs, tmp_path / "expected", intermediate_size=20, multiple_of=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_dry_run_tells_and_writes_nothing(llama, tmp_path):
    reshard(llama, 3, seed=2)
    before = sorted(tmp_path.rglob("*"))
    arguments = dict(pruning_ratio=0.5, multiple_of=2, layers=[0, 2])
    told = prune_checkpoint(llama, tmp_path / "out", dry_run=True, **arguments)
    assert sorted(tmp_path.rglob("*")) == before
    done = prune_checkpoint(llama, tmp_path / "out", **arguments)
    assert told.kept == {} and sorted(done.kept) == [0, 2]
    assert told.files == {name: len(data) for name, data in contents(tmp_path / "out").items()}
    assert {**told.to_dict(), "kept": 0} == {**done.to_dict(), "kept": 0}
    assert f"{WIDTH} -> {WIDTH // 2} neurons in 2 layers" in str(told)
    json.dumps(done.to_dict())


def test_hub_id_is_downloaded_without_other_formats(llama, tmp_path, monkeypatch):
    asked = {}

    def download(name, **patterns):
        asked.update(patterns, name=name)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    prune_checkpoint("somebody/model", tmp_path / "out", intermediate_size=20, multiple_of=1)
    assert (tmp_path / "out" / SINGLE_FILE).exists()
    assert asked["name"] == "somebody/model"
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not any("bin" in pattern or "pt" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


GATE = "model.layers.1.mlp.gate_proj.weight"


def _save(folder, **changes):
    tensors = load(folder / SINGLE_FILE) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / SINGLE_FILE)


def _configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def _without_layer(folder):
    _save(folder, **{name: None for name in load(folder / SINGLE_FILE) if ".layers.1.mlp." in name})


def _with_nan(folder):
    gate = load(folder / SINGLE_FILE)[GATE]
    gate[3, 3] = float("nan")
    _save(folder, **{GATE: gate})


BAD_CHECKPOINTS = {
    "missing projection": (lambda f: _save(f, **{GATE: None}), "layer 1 has no tensor mlp.gate_proj.weight"),
    "wrong shape": (lambda f: _save(f, **{GATE: torch.zeros(51, 24)}), r"gate_proj.weight.* has shape \[51, 24\]"),
    "wrong bias": (lambda f: _save(f, **{GATE.replace("weight", "bias"): torch.zeros(7)}), r"bias' has shape \[7\]"),
    "integers": (lambda f: _save(f, **{GATE: torch.zeros(WIDTH, HIDDEN).short()}), "dtype I16: allowed are BF16"),
    "quantized": (lambda f: _save(f, **{GATE + "_scale": torch.ones(1)}), "weight_scale' .* quantized"),
    "adapter": (lambda f: _save(f, **{GATE.replace("weight", "lora_A.weight"): torch.ones(1)}), "lora_A"),
    "two stacks": (lambda f: _save(f, **{"tower." + GATE: torch.zeros(WIDTH, HIDDEN)}), "several stacks"),
    "missing layer": (_without_layer, "layer 2 has MLP tensors, but layer 1 has none"),
    "NaN": (_with_nan, "score of layer 1 has 1 NaN"),
    "layer too many": (lambda f: _configure(f, num_hidden_layers=2), "MLPs of 3 layers, its config says 2"),
    "absurd layers": (lambda f: _configure(f, num_hidden_layers=10**12), "num_hidden_layers=1000000000000"),
    "width in config": (lambda f: _configure(f, intermediate_size=51), "the config says"),
    "unsupported": (lambda f: _configure(f, model_type="mixtral"), "'mixtral' is not supported"),
    "composite": (lambda f: _configure(f, model_type="gemma3", text_config={}), "composite"),
    "odd config": (lambda f: _configure(f, hidden_size="many"), "config.json is no usable config"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: (f / SINGLE_FILE).unlink(), "only safetensors checkpoints"),
    "pickle": (lambda f: (f / SINGLE_FILE).rename(f / "pytorch_model.bin"), "only safetensors checkpoints"),
}


@pytest.mark.parametrize("damage, message", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS.keys())
def test_bad_checkpoints_are_refused(llama, tmp_path, damage, message):
    damage(llama)
    before = contents(llama)
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1)
    assert [p.name for p in tmp_path.iterdir()] == ["llama"] and contents(llama) == before


def test_bad_arguments_are_refused(llama, tmp_path, monkeypatch):
    def refused(message, source=llama, destination=tmp_path / "out", error=ValueError, **arguments):
        with pytest.raises(error, match=message):
            prune_checkpoint(source, destination, **{"intermediate_size": 20, "multiple_of": 1, **arguments})

    refused("unknown score 'magnitude'.*maw.*hybrid", score="magnitude")
    refused("unknown score", score=lambda gate, up, down: gate.sum(1))
    refused("exactly one", pruning_ratio=0.5)
    refused("out of range", layers=[0, 3])
    refused("must hold integers", layers=[0.5], error=TypeError)
    refused("must lie outside the source", destination=llama)
    refused("must lie outside the source", destination=llama / "x" / "..")
    refused("must lie outside the source", destination=llama / "pruned")
    link = tmp_path / "link"
    link.symlink_to(llama)
    refused("must lie outside the source", destination=link)
    link.unlink()
    refused("neither a model folder nor a Hub id", source=llama / "config.json")
    refused("neither a model folder nor a Hub id", source=tmp_path / "nothing")

    def offline(*_, **__):
        raise RuntimeError("off\nline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("some/model is neither a model folder nor a reachable Hub id: off$", source="some/model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("exists and is not empty", destination=tmp_path / "full")
    refused("is not a folder", destination=tmp_path / "full" / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "llama"]


def test_transformers_is_not_imported(llama, tmp_path):
    """It takes longer than pruning a small checkpoint."""
    script = """
        import sys
        from gluprune.cli import main

        assert main(sys.argv[1:]) == 0 and "transformers" not in sys.modules
    """
    arguments = ["prune", llama, "--out", tmp_path / "out", "--pruning-ratio", "0.5", "--multiple-of", "1"]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *arguments], check=True)


@pytest.mark.parametrize("layers", [None, [0]])
def test_entries_that_the_config_leaves_to_transformers(llama, tmp_path, layers):
    """The same with defaults left out, which only the config class knows."""
    arguments = dict(intermediate_size=20, multiple_of=1, layers=layers)
    told = prune_checkpoint(llama, tmp_path / "expected", **arguments)
    file = llama / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "tie_word_embeddings"}))
    report = prune_checkpoint(llama, tmp_path / "out", **arguments)
    assert report.to_dict()["kept"] == told.to_dict()["kept"] and report.parameters == told.parameters
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    assert_same_config(tmp_path / "out", tmp_path / "expected")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_one_layer_and_a_few_blocks(tmp_path):
    """Peak resident memory of a process that prunes 380 MB, above what the imports take."""
    config = dict(vocab_size=256, hidden_size=1024, intermediate_size=5504, num_hidden_layers=11, head_dim=64)
    # Not getrusage: its maximum begins with that of the process that started this one.
    script = """
        import re, sys
        from pathlib import Path
        from gluprune.checkpoints.stream import prune_checkpoint

        def peak():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

        tiny, source, destination = sys.argv[1:]
        prune_checkpoint(tiny, destination + "tiny", pruning_ratio=0.5, multiple_of=1)  # loads libraries
        before = peak()
        for score in ("maw", "maw_gud"):  # the second reads the down projection too
            prune_checkpoint(source, destination + score, pruning_ratio=0.3, score=score)
            print(peak() - before)
    """
    source, tiny = tmp_path / "source", tmp_path / "tiny"
    big = tiny_model("llama", **config, num_attention_heads=4, num_key_value_heads=4, mlp_bias=False)
    big.save_pretrained(source)
    tiny_model("llama").save_pretrained(tiny)
    del big
    size = (source / SINGLE_FILE).stat().st_size
    layer = 3 * config["hidden_size"] * config["intermediate_size"] * 2
    assert size > 380e6
    command = [sys.executable, "-c", textwrap.dedent(script), source.with_name("tiny"), source, tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    maw, maw_gud = map(int, run.stdout.split()[-2:])
    print(f"{maw / 1e6:.0f} and {maw_gud / 1e6:.0f} MB for {size / 1e6:.0f} MB, one MLP has {layer / 1e6:.0f} MB")
    assert 2 / 3 * layer * 0.9 < maw < 2 / 3 * layer + 40e6
    assert layer * 0.9 < maw_gud < layer + 40e6
