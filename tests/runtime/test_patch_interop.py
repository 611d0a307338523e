"""Patched models together with what people put on, in and around them. Before and after, answers must stay the same."""

import copy
import json
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import gluprune
from gluprune.runtime import operator
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import patch, unpatch
from tests.helpers.tiny_models import DEVICE, assert_unchanged, gradients, logits, mlps, snapshot, tiny_model, token_ids

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def reasons(model):
    return [entry.reason for entry in fusion_status(model)]


@pytest.fixture
def ids():
    return token_ids(device=DEVICE)


@pytest.fixture
def model():
    return tiny_model(device=DEVICE)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Counts what reaches the kernels."""
    calls, kernels = [], operator.run_kernels
    monkeypatch.setattr(operator, "run_kernels", lambda *args: calls.append(args[-1]) or kernels(*args))
    return calls


# --- hooks ---


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
@pytest.mark.parametrize("hook_first", [True, False])
def test_hooks_inside_an_mlp_act(model, ids, add, where, hook_first):
    plain = copy.deepcopy(model)
    add(getattr(mlps(plain)[0], where))
    if not hook_first:
        patch(model, "triton")
    handle = add(getattr(mlps(model)[0], where))
    if hook_first:
        patch(model, "triton")
    assert reasons(model) == [f"{where} carries a hook", ""]
    assert_same(logits(model, ids), logits(plain, ids))
    expected = gradients(plain, ids)
    for name, grad in gradients(model, ids).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)
    handle.remove()
    patch(model, "triton")
    assert reasons(model) == ["", ""]


@pytest.mark.parametrize("add", HOOKS)
def test_hooks_on_an_mlp_act_and_leave_it_fused(model, ids, add):
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


def test_parametrized_and_pruned_projections_act(model, ids):
    plain = copy.deepcopy(model)
    patch(model, "triton")
    for each in (model, plain):
        nn.utils.parametrizations.weight_norm(mlps(each)[0].up_proj)
        torch_prune.l1_unstructured(mlps(each)[1].down_proj, "weight", amount=0.5)
        with torch.no_grad():
            mlps(each)[0].up_proj.parametrizations.weight.original0.mul_(2)
    assert reasons(model) == ["up_proj is torch's ParametrizedLinear", "down_proj carries a hook"]
    assert_same(logits(model, ids), logits(plain, ids))


# --- adapters, quantized weights ---


def lora(model, names, seed=3):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("names", [["down_proj"], ["gate_proj", "up_proj", "down_proj"], ["q_proj"]], ids=",".join)
@pytest.mark.parametrize("lora_first", [True, False])
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


# --- accelerate ---


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
def test_placing_hooks_leave_the_mlps_fused(model, ids, tmp_path, patch_first, kernel_calls):
    """With a device map every module is wrapped; without offloading, only to move inputs that need no moving."""
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


# --- compilers ---


@pytest.mark.parametrize(
    "backend, options", [("auto", {"fullgraph": True}), ("triton", {"fullgraph": True, "mode": "reduce-overhead"})]
)
def test_compile(ids, backend, options):
    torch.compiler.reset()
    model = tiny_model(device=DEVICE, num_hidden_layers=1)
    patch(model, backend)
    expected = logits(model, ids)
    compiled = torch.compile(model, **options)
    assert_same(logits(compiled, ids), expected)
    assert_same(logits(compiled, ids), expected)


def test_compile_with_a_changing_number_of_tokens():
    torch.compiler.reset()
    model = tiny_model(device=DEVICE, num_hidden_layers=1)
    patch(model, "triton")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((2, 7), (3, 5), (1, 9)):
        ids = token_ids(batch, length, device=DEVICE)
        assert_same(logits(compiled, ids), logits(model, ids))


def test_compiled_training(ids):
    torch.compiler.reset()
    model = tiny_model(width=128, device=DEVICE).train()
    expected = gradients(model, ids)
    patch(model, "triton")
    assert reasons(model) == ["", ""]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_compiled_operator_copes_with_weights_that_left_their_storage(model, ids):
    torch.compiler.reset()
    patch(model, "triton")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = logits(compiled, ids)
    for mlp in mlps(model):
        mlp.gate_proj.weight.data = mlp.gate_proj.weight.data.clone()
    assert_same(logits(compiled, ids), expected)


def test_patching_forgets_what_was_compiled(model, monkeypatch):
    """Once for each change, and not where nothing changes: other models would compile again for nothing."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch._dynamo)
    for change, expected in [(unpatch, 0), (patch, 1), (patch, 1), (unpatch, 2), (unpatch, 2)]:
        change(model)
        assert len(resets) == expected


@pytest.mark.parametrize(
    "spoil", [lambda bias: bias[:1], lambda bias: bias.repeat_interleave(2)[::2]], ids=["length", "strides"]
)
def test_biases_that_do_not_fit_go_through_the_modules(spoil, kernel_calls):
    model, ids = tiny_model(mlp_bias=True, device=DEVICE), token_ids(device=DEVICE)
    patch(model, "triton")
    linear = mlps(model)[0].up_proj
    linear.bias = nn.Parameter(spoil(linear.bias.detach()))
    expected = logits(unpatch(copy.deepcopy(model)), ids)
    kernel_calls.clear()
    assert_same(logits(model, ids), expected)
    assert len(kernel_calls) == 1 and "biases" in fusion_status(model)[0].reason


def test_patching_what_is_compiled_from_outside_compiles_anew(model, ids, kernel_calls):
    torch.compiler.reset()
    compiled = torch.compile(lambda ids: model(ids).logits, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(ids)
        patch(model, "triton")
        assert_same(compiled(ids), expected)
        assert len(kernel_calls) == 2
        unpatch(model)
        assert_same(compiled(ids), expected)
        assert len(kernel_calls) == 2


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("strict", [True, False])
def test_export(model, ids, backend, strict, tmp_path):
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    expected = logits(model, ids)
    patch(model, backend)
    with torch.no_grad():
        program = torch.export.export(Logits(), (ids,), strict=strict)
        assert "gluprune" not in str(program.graph)  # so it runs where this package is not installed
        assert_same(program.module()(ids), expected)
        torch.export.save(program, tmp_path / "model.pt2")
        assert_same(torch.export.load(tmp_path / "model.pt2").module()(ids), expected)


def test_dispatch_modes_see_the_operator(model):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    patch(model, "triton")
    with torch.no_grad(), Record():
        mlps(model)[0](torch.randn(5, 48, device=DEVICE))
    assert torch.ops.gluprune.glu_mlp.default in seen


def test_a_jit_trace_holds_pytorchs_operators(model):
    patch(model, "triton")
    mlp = mlps(model)[0]
    x, other = torch.randn(2, 5, 48, device=DEVICE)
    with torch.no_grad():
        traced = torch.jit.trace(mlp, x)
        assert "gluprune::" not in str(traced.inlined_graph)
        assert_same(traced(other), mlp(other))


# --- a real checkpoint ---


@pytest.mark.skipif(not operator.INTERPRETED, reason="bit-equal only on the CPU")
def test_smollm2_on_the_cpu_answers_the_same(smollm2_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2_path).eval()
    ids = torch.randint(0, 40000, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = logits(model, ids)
    patch(model)
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path)
    assert (smollm2_path / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    configs = [json.loads((folder / "config.json").read_bytes()) for folder in (smollm2_path, tmp_path)]
    for config in configs:
        config.pop("transformers_version")  # the cached model may have been made with another
    assert configs[0] == configs[1]


@pytest.mark.skipif(not operator.INTERPRETED, reason="float32 of another summation order may choose other tokens")
@pytest.mark.parametrize("ratio, width", [(None, 1536), (0.4, 922)])
def test_smollm2_fused_answers_the_same(smollm2_path, tmp_path, ratio, width):
    """The whole model in aligned storage: its tokens, its checkpoint, and itself again once unpatched."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    if ratio:
        gluprune.prune(model, pruning_ratio=ratio, multiple_of=1)
    assert model.config.intermediate_size == width
    ids = torch.randint(0, 40000, (1, 4), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    before, expected = snapshot(model), model.generate(ids, **options)
    patch(model, "cublas")
    assert reasons(model) == [""] * 30
    assert torch.equal(model.generate(ids, **options), expected)
    model.save_pretrained(tmp_path)
    unpatch(model)
    assert_unchanged(model, before)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, reloaded[name]) for name, weight in model.state_dict().items())


@pytest.mark.skipif(not operator.INTERPRETED, reason="takes the interpreter's path")
def test_one_smollm2_layer_fused(smollm2_path):
    """Real weights of real size: the first layer's MLP in float32."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32, num_hidden_layers=1).eval()
    ids = torch.randint(0, 40000, (1, 3), generator=torch.Generator().manual_seed(0))
    expected = logits(model, ids)
    patch(model, "triton")
    assert reasons(model) == [""]
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-4, rtol=1e-4)
