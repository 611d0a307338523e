"""Pruning on disk: the output files."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gluprune
from gluprune.checkpoints import load_save
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io.shards import INDEX_FILE, SINGLE_FILE, read_shard
from tests.helpers.streaming import HIDDEN, WIDTH, contents, load, raw_save, reshard, stored, tiny_model


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
    # With one width again, the per-layer form is removed.
    prune_checkpoint(tmp_path / "second", tmp_path / "third", intermediate_size=12, multiple_of=1, layers=[1])
    config = json.loads((tmp_path / "third" / "config.json").read_text())
    assert config["intermediate_size"] == 12 and "per_layer_config" not in config


def test_other_config_entries_are_kept(llama, tmp_path):
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


def test_a_stored_tied_head_counts_once(tmp_path):
    source = tmp_path / "source"
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(source)
    tensors = load(source / SINGLE_FILE)
    raw_save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, source / SINGLE_FILE)
    report = prune_checkpoint(source, tmp_path / "out", intermediate_size=20, multiple_of=1)
    assert report.original_parameters == sum(p.numel() for p in model.parameters())
    assert report.parameters == sum(p.numel() for p in load_save.load(tmp_path / "out").parameters())


def test_other_files_are_copied_but_not_other_weights(llama, tmp_path):
    copied = ["tokenizer.json", "chat_template.jinja", "modeling_custom.py", "additional_chat_templates/tool.jinja"]
    skipped = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "a.GGUF", "params.json"]
    copied += ["LICENSE", "NOTICE", "USE_POLICY.md", "tokenizer.model", "docs/README.md"]
    skipped += [".gitattributes", "original/consolidated.00.pth", "adapter_config.json", "adapter_model.safetensors"]
    skipped += ["trainer_state.json", "all_results.json", "training_args.bin"]
    left = [".git/config", "checkpoint-500/model.safetensors", "runs/Nov27/events", "wandb/run", "global_step9/x.pt"]
    for name in [*copied, *skipped, *left, "README.md", "gluprune.json"]:
        (llama / name).parent.mkdir(parents=True, exist_ok=True)
        (llama / name).write_bytes(os.urandom(3000))
    (llama / INDEX_FILE).write_text("stale: there is also a single file")
    report = prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1)
    after = contents(tmp_path / "out")
    assert set(after) == {*copied, "config.json", "generation_config.json", SINGLE_FILE, "README.md", "gluprune.json"}
    assert all(after[name] != (llama / name).read_bytes() for name in ("README.md", "gluprune.json"))
    assert all(after[name] == (llama / name).read_bytes() for name in [*copied, "generation_config.json"])
    folders = {name.partition("/")[0] + "/" for name in left}
    assert set(report.skipped) == {*skipped, *folders, INDEX_FILE}
    assert report.files == {name: len(data) for name, data in after.items()}
    assert "pytorch_model.bin" in str(report)


def test_links_are_followed(llama, tmp_path):
    """A folder of the Hub cache consists of links to blobs."""
    blobs = tmp_path / "blobs"
    llama.rename(blobs)
    llama.mkdir()
    for file in blobs.iterdir():
        (llama / file.name).symlink_to(file)
    prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1)
    prune_checkpoint(blobs, tmp_path / "expected", intermediate_size=20, multiple_of=1)
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    named = {"README.md", "gluprune.json"}  # they name the folder
    assert {name: ours[name] for name in ours.keys() - named} == {name: theirs[name] for name in ours.keys() - named}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_linked_folders_are_named_as_skipped(llama, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    for name in ("1_Pooling", "docs"):
        (llama / name).symlink_to(tmp_path / "elsewhere")
    (llama / "itself").symlink_to(llama)
    report = prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1)
    assert report.skipped == ["1_Pooling/", "docs/", "itself/"]
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


def test_dry_run_reports_and_writes_nothing(llama, tmp_path):
    reshard(llama, 3, seed=2)
    before = sorted(tmp_path.rglob("*"))
    arguments = dict(pruning_ratio=0.5, multiple_of=2, layers=[0, 2])
    planned = prune_checkpoint(llama, tmp_path / "out", dry_run=True, **arguments)
    assert sorted(tmp_path.rglob("*")) == before
    done = prune_checkpoint(llama, tmp_path / "out", **arguments)
    assert planned.kept == {} and sorted(done.kept) == [0, 2]
    assert planned.files == {name: len(data) for name, data in contents(tmp_path / "out").items()}
    assert {**planned.to_dict(), "kept": 0} == {**done.to_dict(), "kept": 0}
    assert f"{WIDTH} -> {WIDTH // 2} neurons in 2 layers" in str(planned)
    json.dumps(done.to_dict())


def test_modules_of_sentence_transformers_keep_their_weights(llama, tmp_path):
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (llama / "modules.json").write_text(json.dumps(modules))
    names = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"]
    for name in [*names, "3_Other/model.safetensors"]:
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text(name)
    report = prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1)
    after = contents(tmp_path / "out")
    assert all(after[name] == name.encode() for name in names) and report.skipped == ["3_Other/model.safetensors"]
    for content in ("{", "3", "[3]", '[{"path": 3}]', '[{"path": "/"}]'):
        (llama / "modules.json").write_text(content)
        assert (
            "2_Dense/model.safetensors"
            in prune_checkpoint(llama, tmp_path / "other", intermediate_size=20, multiple_of=1, dry_run=True).skipped
        )
