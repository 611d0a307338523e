"""Saving and loading: bit-equal, stock where the widths allow it, and the folder is complete or absent."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import gluprune
from gluprune.checkpoints.load_save import build_empty, read_config
from gluprune.models.glu import model_glus
from gluprune.models.widths import layer_widths
from tests.helpers.marks import slow

IDS = torch.tensor([[5, 9, 33, 2, 60, 17], [8, 8, 21, 44, 3, 7]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32, torch.float16)], ids=["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_stock_reload_gives_equal_logits(family_name, tiny_model, tmp_path, dtype, patched):
    model = tiny_model(family_name, dtype)
    gluprune.prune(model, pruning_ratio=0.3, multiple_of=1)
    expected = model(IDS).logits
    if patched:
        gluprune.patch_llama(model)
    gluprune.save(model, tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert again.dtype == dtype and again.config.intermediate_size == 71
    assert torch.equal(again(IDS).logits, expected)
    if patched:
        assert torch.equal(gluprune.patch_llama(again)(IDS).logits, expected)


def test_plain_save_pretrained_is_enough(tiny_model, tmp_path):
    model = tiny_model("qwen3", torch.bfloat16)
    gluprune.prune(model, expansion_ratio=2.0, multiple_of=16, score="l2")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 64
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_layers_of_different_widths(family_name, tiny_model, tmp_path):
    """Stock loading raises; gluprune.load returns a model with the same logits, tokens and class."""
    model = tiny_model(family_name, torch.bfloat16)
    gluprune.prune(model, intermediate_size=64, multiple_of=1, layers=[0])
    gluprune.prune(model, intermediate_size=80, multiple_of=1, layers=[2])
    gluprune.save(model, tmp_path / "pruned")
    with pytest.raises(Exception, match="per-layer attribute|size mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    again = gluprune.load(tmp_path / "pruned")
    assert type(again) is type(model)
    assert layer_widths(again.config) == [64, 101, 80]
    assert [glu.intermediate_size for glu in model_glus(again)] == [64, 101, 80]
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(again.generate(IDS, **options), model.generate(IDS, **options))
    gluprune.save(again, tmp_path / "twice")
    assert torch.equal(gluprune.load(tmp_path / "twice")(IDS).logits, model(IDS).logits)


def test_load_of_one_width_is_the_stock_model(tiny_model, tmp_path):
    model = tiny_model()
    gluprune.save(model, tmp_path / "dense")
    again = gluprune.load(tmp_path / "dense", dtype=torch.bfloat16)
    assert type(again) is type(model) and again.dtype == torch.bfloat16


def test_empty_model_has_the_shapes_of_the_real_one(family_name, tiny_model):
    model = tiny_model(family_name, torch.bfloat16)
    gluprune.prune(model, intermediate_size=64, multiple_of=1, layers=[1])
    empty = build_empty(model.config)
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
    assert {name: (parameter.shape, parameter.dtype) for name, parameter in empty.named_parameters()} == shapes


def test_save_rejects_a_folder_that_is_not_empty(tiny_model, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="exists and is not empty"):
        gluprune.save(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="exists and is not a folder"):
        gluprune.save(tiny_model(), tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_save_into_an_empty_folder(tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    gluprune.save(tiny_model(), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_all_saved_files_have_the_permissions_of_new_files(tiny_model, tmp_path):
    """Not those of safetensors, which lets only the owner read."""
    gluprune.save(tiny_model("llama"), tmp_path / "saved")
    (tmp_path / "new").write_text("")
    expected = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "saved").iterdir()} == {expected}


def test_interrupted_save_leaves_nothing(tiny_model, tmp_path):
    class Interrupting:
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gluprune.save(tiny_model(), tmp_path / "out", tokenizer=Interrupting())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, {}, "not json"])
def test_a_path_that_is_not_a_model(tmp_path, content):
    path = tmp_path / "model"
    if content is not None:
        path.mkdir()
        (path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    for call in (gluprune.load, read_config):
        with pytest.raises(ValueError, match="model is neither a model folder nor a reachable Hub id: .+"):
            call(path)


def test_load_of_an_unsupported_family(tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        gluprune.load(tmp_path)


def test_remote_code_stays_off(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError):
        gluprune.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_real_model_pruned_to_an_unaligned_width(smollm2, smollm2_tokenizer, tmp_path):
    report = gluprune.prune(smollm2, pruning_ratio=0.1, multiple_of=1)
    assert report.intermediate_size == 1383
    ids = smollm2_tokenizer("The lighthouse at the end of the peninsula", return_tensors="pt").input_ids
    gluprune.save(smollm2, tmp_path / "pruned", smollm2_tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, smollm2(ids).logits)
