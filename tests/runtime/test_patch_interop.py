"""Patched models together with hooks, adapters, quantization and offloading: outputs must stay the same."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForCausalLM

from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import patch, unpatch
from tests.helpers.interop import assert_same, reasons
from tests.helpers.marks import slow
from tests.helpers.tiny_models import DEVICE, gradients, logits, mlps, snapshot, tiny_model


def add_forward_hook(module):
    return module.register_forward_hook(lambda module, args, output: output * 1.5)


def add_forward_pre_hook(module):
    return module.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def add_backward_hook(module):
    return module.register_full_backward_hook(lambda module, grads, _: (grads[0] * 1.5,))


def add_backward_pre_hook(module):
    return module.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 1.5,))


HOOKS = [add_forward_hook, add_forward_pre_hook, add_backward_hook, add_backward_pre_hook]


@pytest.mark.parametrize("add", HOOKS)
@pytest.mark.parametrize("where", ["gate_proj", "up_proj", "down_proj", "act_fn"])
@pytest.mark.parametrize("hook_first", [True, *slow(False)])
def test_hooks_inside_an_mlp_run(model, ids, add, where, hook_first):
    plain = copy.deepcopy(model)
    add(getattr(mlps(plain)[0], where))
    if not hook_first:
        patch(model, "triton")
    handle = add(getattr(mlps(model)[0], where))
    if hook_first:
        patch(model, "triton")
    assert reasons(model) == [f"{where} has a hook", ""]
    assert_same(logits(model, ids), logits(plain, ids))
    expected = gradients(plain, ids)
    for name, grad in gradients(model, ids).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)
    handle.remove()
    patch(model, "triton")
    assert reasons(model) == ["", ""]


@pytest.mark.parametrize("add", HOOKS)
def test_hooks_on_an_mlp_run_and_keep_it_fused(model, ids, add):
    plain = copy.deepcopy(model)
    add(mlps(plain)[0])
    patch(model, "triton")
    add(mlps(model)[0])
    assert reasons(model) == ["", ""]
    assert_same(logits(model, ids), logits(plain, ids))
    expected = gradients(plain, ids)
    for name, grad in gradients(model, ids).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)


def test_hooks_for_all_modules_see_the_projections(model, ids):
    patch(model, "triton")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        logits(model, ids)
    finally:
        handle.remove()
    assert mlps(model)[0].up_proj in seen


def test_parametrized_and_pruned_projections_take_effect(model, ids):
    plain = copy.deepcopy(model)
    patch(model, "triton")
    for each in (model, plain):
        nn.utils.parametrizations.weight_norm(mlps(each)[0].up_proj)
        torch_prune.l1_unstructured(mlps(each)[1].down_proj, "weight", amount=0.5)
        with torch.no_grad():
            mlps(each)[0].up_proj.parametrizations.weight.original0.mul_(2)
    assert reasons(model) == ["up_proj is torch's ParametrizedLinear", "down_proj has a hook"]
    assert_same(logits(model, ids), logits(plain, ids))


def lora(model, names, seed=3):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("names", [["down_proj"], ["gate_proj", "up_proj", "down_proj"], ["q_proj"]], ids=",".join)
@pytest.mark.parametrize("lora_first", [True, *slow(False)])
def test_lora(model, ids, names, lora_first):
    reference = lora(copy.deepcopy(model), names)
    if lora_first:
        adapted = lora(model, names)
        before = snapshot(adapted)
        patch(adapted, "triton")
    else:
        adapted = lora(patch(model, "triton"), names)
    left = [] if names == ["q_proj"] else [f"{names[0]} is peft's Linear"]
    assert [reason for reason in reasons(adapted) if reason] == 2 * left
    assert_same(logits(adapted, ids), logits(reference, ids))
    expected = gradients(reference, ids)
    assert expected and gradients(adapted, ids).keys() == expected.keys()
    for name, grad in gradients(adapted, ids).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)
    if lora_first:
        assert snapshot(unpatch(adapted)) == before
        patch(adapted, "triton")
    merged, expected = adapted.merge_and_unload(), logits(reference.merge_and_unload(), ids)
    assert_same(logits(merged, ids), expected)
    patch(merged, "triton")
    assert reasons(merged) == ["", ""]
    assert_same(logits(merged, ids), expected)


def test_unpatch_under_lora_frees_the_buffers(model, ids):
    adapted = lora(patch(model, "triton"), ["up_proj"])
    unpatch(adapted)
    for parameter in adapted.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.parametrize("quantize_first", [True, False])
def test_torchao(ids, quantize_first):
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(device=DEVICE)
    plain = copy.deepcopy(model)
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(plain.model.layers[0], config)
    if not quantize_first:
        patch(model, "triton")
    quantization.quantize_(model.model.layers[0], config)
    if quantize_first:
        patch(model, "triton")
    assert [bool(reason) for reason in reasons(model)] == [True, False]
    assert "gate_proj.weight is Int8Tensor" in reasons(model)[0]
    assert_same(logits(model, ids), logits(plain, ids))
    assert type(unpatch(model)) is type(plain)
    assert torch.equal(logits(model, ids), logits(plain, ids))


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_bitsandbytes(model, ids, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = copy.deepcopy(model)
    for each in (model, plain):
        for mlp in mlps(each)[:1]:
            options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"compute_dtype": torch.float32}
            quantized = getattr(bitsandbytes.nn, kind)(48, 77, bias=False, **options)
            quantized.load_state_dict({"weight": mlp.up_proj.weight.detach().clone()})
            mlp.up_proj = quantized.to(DEVICE)
    expected = logits(plain, ids)
    patch(model, "triton")
    assert reasons(model) == [f"up_proj is bitsandbytes's {kind}", ""]
    assert_same(logits(model, ids), expected)


def offload_to_cpu(model, folder):
    cpu_offload(model, DEVICE)


def offload_to_disk(model, folder):
    disk_offload(model, folder, DEVICE)


def offload_one_layer(model, folder):
    device_map = {"model.embed_tokens": DEVICE, "model.layers.0": DEVICE, "model.layers.1": "disk"}
    device_map |= {"model.norm": DEVICE, "model.rotary_emb": DEVICE, "lm_head": DEVICE}
    dispatch_model(model, device_map, main_device=DEVICE, offload_dir=folder, force_hooks=True)


def dispatch_to_one_device(model, folder):
    dispatch_model(model, {"": DEVICE}, main_device=DEVICE, force_hooks=True)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(
    "place, fused",
    [(offload_to_cpu, [False, False]), (offload_to_disk, [False, False]), (offload_one_layer, [True, False])],
)
def test_offloading(model, ids, tmp_path, place, fused, patch_first):
    expected = logits(model, ids)
    if patch_first:
        patch(model, "triton")
    place(model, tmp_path)
    if not patch_first:
        patch(model, "triton")
    assert [entry.fused for entry in fusion_status(model)] == fused
    assert all("offloaded" in reason for reason in reasons(model) if reason)
    assert_same(logits(model, ids), expected)
    assert_same(logits(unpatch(model), ids), expected)
    remove_hook_from_module(model, recurse=True)
    assert_same(logits(model, ids), expected)


@pytest.mark.parametrize("patch_first", [True, False])
def test_device_placement_hooks_keep_the_mlps_fused(model, ids, tmp_path, patch_first, kernel_calls):
    """A device map wraps every module; without offloading, the wrappers only move inputs that are already in place."""
    expected = logits(model, ids)
    if patch_first:
        patch(model, "triton")
    dispatch_to_one_device(model, tmp_path)
    if not patch_first:
        patch(model, "triton")
    assert reasons(model) == ["", ""]
    assert_same(logits(model, ids), expected)
    assert len(kernel_calls) == 2
    unpatch(model)
    assert torch.equal(logits(model, ids), expected) and len(kernel_calls) == 2
    patch(model, "triton")
    remove_hook_from_module(model, recurse=True)
    assert_same(logits(model, ids), expected)
    assert len(kernel_calls) == 4
    unpatch(model)
    assert torch.equal(logits(model, ids), expected) and len(kernel_calls) == 4


def test_device_map_of_a_checkpoint(model, ids, tmp_path):
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": DEVICE}, attn_implementation="eager")
    patch(loaded, "triton")
    assert reasons(loaded) == ["", ""]
    assert_same(logits(loaded, ids), expected)
