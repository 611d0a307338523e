"""Models in the wrappers of other libraries, and weights that are somewhere else."""

import copy

import pytest
import torch
from torch import nn

import gluprune
from gluprune.calibration.collect import calibrate
from gluprune.models.wrappers import unwrapped
from tests.helpers.tiny_models import assert_unchanged, snapshot, token_ids

WIDTH = 61


def prune(model):
    return gluprune.prune(model, intermediate_size=WIDTH, multiple_of=1)


def adapted(model, targets, task="CAUSAL_LM"):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type=task))


@pytest.mark.parametrize("call", [prune, lambda model: calibrate(model, [token_ids()])])
@pytest.mark.parametrize("targets", [["q_proj"], ["gate_proj"]])
def test_adapters_that_are_not_merged_are_refused_with_what_to_do(tiny_model, call, targets):
    model = adapted(tiny_model(), targets)
    before = snapshot(model)
    message = r"PeftModelForCausalLM has adapters that are not merged: .* model = model\.merge_and_unload\(\)"
    with pytest.raises(ValueError, match=message):
        call(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", [prune, lambda model: calibrate(model, [token_ids()])])
@pytest.mark.parametrize("how", ["get_base_model", "inject_adapter_in_model"])  # add_adapter calls the latter
def test_adapters_inside_a_model_of_transformers(tiny_model, call, how):
    peft = pytest.importorskip("peft")
    if how == "get_base_model":
        model = adapted(tiny_model(), ["q_proj"]).get_base_model()
    else:
        model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), tiny_model())
    before = snapshot(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has adapters that are not merged: merge them first, with"):
        call(model)
    assert_unchanged(model, before)


def test_merging_as_the_error_says(tiny_model, tmp_path):
    """A model without the PEFT model around it: the adapter is saved, loaded on the base model and merged."""
    peft = pytest.importorskip("peft")
    outer = adapted(tiny_model(seed=1), ["q_proj"])
    with torch.no_grad():
        for name, parameter in outer.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with pytest.raises(ValueError, match=r"peft\.PeftModel\.from_pretrained\(base_model, adapter\).*merge_and_unload"):
        prune(outer.get_base_model())
    outer.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(tiny_model(seed=1), tmp_path).merge_and_unload()
    torch.testing.assert_close(merged(token_ids()).logits, outer(token_ids()).logits, rtol=0, atol=1e-5)
    prune(merged)


@pytest.mark.parametrize("merge", [False, True])
def test_a_model_with_adapters_is_not_saved(tiny_model, tmp_path, merge):
    """Adapter layers would be written under names that no stock model has."""
    model = adapted(tiny_model(), ["q_proj"])
    if merge:
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"model = model\.merge_and_unload\(\)"):
        gluprune.save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    plain = model.merge_and_unload()
    gluprune.save(plain, tmp_path / "saved")
    loaded = gluprune.load(tmp_path / "saved").state_dict()
    assert loaded.keys() == plain.state_dict().keys()


def test_merged_adapters(tiny_model):
    """Merged in place, or merged and unloaded: the base model is pruned."""
    model = adapted(tiny_model(), ["q_proj"])
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    plain = model.merge_and_unload()
    found, expected = prune(merged), prune(plain)
    assert all(torch.equal(kept, expected.kept[layer]) for layer, kept in found.kept.items())
    assert merged.get_base_model().config.intermediate_size == WIDTH
    assert unwrapped(merged.get_base_model()) is merged.get_base_model()
    assert calibrate(merged, [token_ids()]).tokens == token_ids().numel()


def test_a_merged_adapter_of_an_mlp_is_named(tiny_model):
    model = adapted(tiny_model(), ["gate_proj"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="layer 0, gate_proj is peft's Linear, not nn.Linear: .*merge the adapter"):
        prune(model)


def test_a_compiled_model_is_unwrapped(tiny_model):
    model, plain = tiny_model(seed=1), tiny_model(seed=1)
    compiled = torch.compile(model)  # compiles at the first call, which this test does not make
    assert unwrapped(compiled) is model
    statistics = calibrate(compiled, [token_ids()])
    assert statistics.tokens == token_ids().numel()
    assert prune(compiled) == prune(plain)
    assert compiled.config.intermediate_size == WIDTH


def run_compiled(model, parts):
    """Compile parts of a model, and run it: hooks that are added afterwards are ignored."""
    for part in parts:
        part.compile(backend="eager")
    with torch.no_grad():
        model(token_ids(), use_cache=False)
    return model


@pytest.mark.parametrize("part", ["", "model", "model.layers.1", "model.layers.1.mlp"])
def test_compiled_parts(tiny_model, part):
    """Compiled code ignores hooks that are added after its first run: calibration runs what was compiled."""
    model, plain = tiny_model(seed=1), tiny_model(seed=1)
    run_compiled(model, [model.get_submodule(part)])
    model(token_ids(), use_cache=False).logits.sum().backward()  # with gradients, it is compiled once more
    ids = [token_ids()]
    for options in ({}, {"sensitivity": True}):
        found, expected = calibrate(model, ids, **options), calibrate(plain, ids, **options)
        for name in ("gram", "saliency") if options else ("gram",):
            assert torch.equal(getattr(found.layers[1], name), getattr(expected.layers[1], name)), name
    assert prune(model) == prune(plain)
    for refitted in (model, plain):
        gluprune.reconstruct(refitted, tiny_model(seed=1), ids)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, plain.model.layers[1].mlp.down_proj.weight)
    dense, narrower = tiny_model(seed=1), copy.deepcopy(plain)
    run_compiled(dense, [dense.get_submodule(part)])
    for teacher, student in ((dense, model), (tiny_model(seed=1), narrower)):
        gluprune.reconstruct(student, teacher, ids)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, narrower.model.layers[1].mlp.down_proj.weight)


def test_a_compiled_model_is_saved(tiny_model, tmp_path):
    model = tiny_model()
    gluprune.save(torch.compile(model), tmp_path / "saved")
    for name, tensor in gluprune.load(tmp_path / "saved").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("call", [prune, lambda model: calibrate(model, [token_ids()])])
def test_wrappers_for_several_devices_are_refused(tiny_model, call):
    with pytest.raises(ValueError, match=r"wrapped in DataParallel: give the model inside it, model\.module"):
        call(nn.DataParallel(tiny_model()))


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("place", ["disk", "meta"])
def test_offloaded_weights_cannot_be_calibrated_or_pruned(tiny_model, tmp_path, gram, place):
    model = tiny_model()
    if place == "meta":
        model.model.layers[1].to("meta")
    else:
        from accelerate import dispatch_model

        devices = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
        devices |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
        dispatch_model(model, devices, offload_dir=tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* is on the meta device: .*without offloading"):
        calibrate(model, [token_ids()], gram=gram)
    with pytest.raises(ValueError, match="layer 1, gate_proj is on the meta device: load the weights first"):
        prune(model)


def partitioned(model):
    """DeepSpeed's ZeRO-3 leaves parameters without elements where they are not gathered."""
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    return model


def test_partitioned_weights_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"layer 0, gate_proj has shape \[0\]: gather the weights first"):
        prune(partitioned(tiny_model()))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \[0\]: gather the weights first"):
        calibrate(partitioned(tiny_model()), [token_ids()])
    with pytest.raises(ValueError, match="gather the weights first"):
        gluprune.reconstruct(partitioned(tiny_model()), tiny_model(), [token_ids()])


def test_a_new_optimizer_after_pruning(tiny_model):
    """What the documentation asks for: an optimizer created afterwards trains the narrower weights."""
    model = tiny_model()
    prune(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    down = model.model.layers[0].mlp.down_proj.weight
    assert optimizer.state[down]["exp_avg"].shape == down.shape == (32, WIDTH)
