import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import gluprune
from gluprune.models.families import FAMILIES
from gluprune.runtime import aligned, operator
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import FusedGLU, patch, patch_llama, unpatch, unpatch_llama
from tests.helpers.tiny_models import DEVICE, gradients, logits, mlps, snapshot, tiny_model, token_ids

# Logits are of order one; kernels and PyTorch add the same products in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def assert_fused(model, count=2):
    status = fusion_status(model)
    assert [entry.fused for entry in status] == [True] * count, status


def assert_same(actual, expected, dtype=torch.float32):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids), **kwargs)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Counts what reaches the kernels."""
    calls, kernels = [], operator.run_kernels
    monkeypatch.setattr(operator, "run_kernels", lambda *args: calls.append(args[-1]) or kernels(*args))
    return calls


# --- every family, dtype and backend ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_family_fused(family, dtype, kernel_calls):
    model, ids = tiny_model(family, dtype=dtype, device=DEVICE), token_ids(device=DEVICE)
    one = ids[:1, :1]
    expected, expected_one = logits(model, ids), logits(model, one)
    assert patch(model, "triton") is model
    assert_fused(model)
    # The interpreter's dot takes bf16 for integers; a single token needs no dot, and cuBLAS is PyTorch's product there.
    if dtype != torch.bfloat16 or not operator.INTERPRETED:
        assert_same(logits(model, ids), expected, dtype)
    assert_same(logits(model, one), expected_one, dtype)
    patch(model, "cublas")
    kernel_calls.clear()
    assert_same(logits(model, ids), expected, dtype)
    assert kernel_calls == ["cublas"] * 2
    unpatch(model)
    kernel_calls.clear()
    assert torch.equal(logits(model, ids), expected) and not kernel_calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_family_on_the_cpu_is_bit_equal_and_moves_nothing(family, dtype):
    model, ids = tiny_model(family, dtype=dtype), token_ids()
    expected, grads = logits(model, ids), gradients(model, ids)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    patch(model)
    assert torch.equal(logits(model, ids), expected)
    for name, grad in gradients(model, ids).items():
        assert torch.equal(grad, grads[name]), name
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("phi3", {"hidden_act": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_act": "silu", "hidden_activation": "silu"}),
        ("granite", {"mlp_bias": True}),
        ("smollm3", {"mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    ],
    ids=str,
)
def test_activations_and_biases_other_than_the_family_usually_has(family, settings, kernel_calls):
    model, ids = tiny_model(family, device=DEVICE, **settings), token_ids(device=DEVICE)
    expected = logits(model, ids)
    patch(model, "triton")
    assert_fused(model)
    assert_same(logits(model, ids), expected)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize("family, width", [("llama", 1), ("llama", 130), ("phi3", 1), ("phi3", 130), ("phi3", 128)])
def test_biases_and_widths(family, width):
    model = tiny_model(family, width, mlp_bias=True, device=DEVICE)
    assert len(list(mlps(model)[0].parameters())) == (6 if family == "llama" else 2)
    ids = token_ids(device=DEVICE)
    expected = logits(model, ids)
    patch(model, "triton")
    assert_fused(model)
    assert_same(logits(model, ids), expected)


def test_float64_is_left_to_pytorch():
    model, ids = tiny_model(dtype=torch.float64), token_ids()
    expected = logits(model, ids)
    patch(model, "triton")
    assert {entry.reason for entry in fusion_status(model)} == {"the weights are float64"}
    assert torch.equal(logits(model, ids), expected)


# --- generation, training ---


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_generate(family, cache, kernel_calls):
    model, ids = tiny_model(family, device=DEVICE), token_ids(device=DEVICE)
    expected = greedy(model, ids, cache_implementation=cache)
    patch(model, "triton")
    assert torch.equal(greedy(model, ids, cache_implementation=cache), expected)
    assert len(kernel_calls) == 2 * 6


@pytest.mark.parametrize("width, fused", [(77, False), (128, True)])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_training_gradients_equal_eager(width, fused, checkpointing):
    model, ids = tiny_model(width=width, device=DEVICE).train(), token_ids(device=DEVICE)
    expected = gradients(model, ids)
    patch(model, "triton")
    assert [entry.fused for entry in fusion_status(model)] == [fused] * 2
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    actual = gradients(model, ids)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(
            grad, expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradients_in_eval_mode_pass_the_operator(kernel_calls):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    expected = gradients(model, ids)
    patch(model, "triton")
    for name, grad in gradients(model, ids).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize("fused_optimizer", [False, True])
@pytest.mark.parametrize("width", [77, 128])
def test_half_trained_models_train_on(width, fused_optimizer):
    """Optimizer states made before patching stay valid, and fused optimizers meet no weight with gaps in it."""
    model, ids = tiny_model(width=width, device=DEVICE), token_ids(device=DEVICE)
    plain = copy.deepcopy(model)

    def steps(model, before_last):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused_optimizer)
        model.train()
        for step in range(3):
            if step == 2:
                before_last()
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    steps(plain, lambda: None)
    steps(model, lambda: patch(model, "triton").eval().train())
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert_fused(model.eval())
    assert_same(logits(model, ids), logits(plain.eval(), ids))


def test_autocast_runs_the_modules(kernel_calls):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected = logits(model, ids)
        patch(model, "triton")
        assert torch.equal(logits(model, ids), expected)
    assert not kernel_calls
    logits(model, ids)
    assert len(kernel_calls) == 2


def test_function_transforms_run_the_modules():
    model = patch(tiny_model(device=DEVICE), "triton")
    mlp = mlps(model)[0]
    x = torch.randn(3, 5, 48, device=DEVICE)
    with torch.no_grad():
        assert_same(torch.vmap(mlp)(x), mlp(x))


@pytest.mark.parametrize("x", [torch.randn(3, 47), torch.randn(3, 48, dtype=torch.float16)], ids=["width", "dtype"])
def test_inputs_that_do_not_fit_fail_as_they_did(x):
    mlp, x = mlps(tiny_model(device=DEVICE))[0], x.to(DEVICE)
    with pytest.raises(RuntimeError) as stock:
        mlp(x)
    patch(mlp, "triton")
    with pytest.raises(RuntimeError) as patched:
        mlp(x)
    assert str(patched.value) == str(stock.value)


# --- conversion, copies, checkpoints ---


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_conversions_keep_the_weights_aligned(family):
    model, ids = tiny_model(family, device=DEVICE), token_ids(device=DEVICE)
    reference = copy.deepcopy(model)
    patch(model, "triton")
    for convert in (lambda m: m.half(), lambda m: m.to(torch.float32), lambda m: m.to("cpu", torch.float16).to(DEVICE)):
        model, reference = convert(model), convert(reference)
        assert_fused(model)
        assert_same(logits(model, ids), logits(reference, ids), next(model.parameters()).dtype)
    assert_fused(model.to(torch.float16))
    assert not any(entry.fused for entry in fusion_status(model.double()))


def test_built_on_meta_then_loaded_with_assign():
    source, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    with torch.device("meta"):
        model = tiny_model(device="meta")
    patch(model, "triton")
    assert "meta device" in fusion_status(model)[0].reason
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    model.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)
    assert_fused(model)
    assert_same(logits(model, ids), logits(source, ids))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_after_patching(family, assign):
    model, other = tiny_model(family, device=DEVICE), tiny_model(family, seed=1, device=DEVICE)
    ids = token_ids(device=DEVICE)
    patch(model, "triton")
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_fused(model)
    assert_same(logits(model, ids), logits(other, ids))
    other.load_state_dict(model.state_dict(), assign=assign)
    assert_same(logits(other, ids), logits(model, ids))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_fused_and_independent(copied):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    expected = logits(model, ids)
    patch(model, "triton")
    twin = copied(model)
    assert_fused(twin)
    assert type(mlps(twin)[0]) is type(mlps(model)[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(logits(twin, ids), expected)
    unpatch(twin)
    assert type(mlps(twin)[0]) is LlamaMLP and torch.equal(logits(twin, ids), expected)


@pytest.mark.parametrize("family, width", [("llama", 77), ("llama", 128), ("phi3", 77)])
def test_saves_bit_equal_and_without_a_copy(family, width, tmp_path, monkeypatch, caplog):
    model = tiny_model(family, width, dtype=torch.bfloat16, device=DEVICE)
    model.save_pretrained(tmp_path / "before")
    patch(model, "triton")
    assert_fused(model)
    clones = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **kwargs: clones.append(self) or clone(self, **kwargs))
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "after")
    assert not clones and not caplog.records
    files = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "after").iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].cpu())


def test_state_dict_has_the_same_names_and_values_and_no_padding():
    model = tiny_model(device=DEVICE)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch(model, "triton")
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    weight = state["model.layers.0.mlp.up_proj.weight"]
    assert weight.untyped_storage().nbytes() == weight.nbytes
    weight[0, 0] = 5  # still the model's memory
    assert mlps(model)[0].up_proj.weight[0, 0] == 5
    kept = model.state_dict(keep_vars=True)
    assert kept["model.layers.0.mlp.up_proj.weight"] is mlps(model)[0].up_proj.weight
    assert list(mlps(model)[0].state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]


@pytest.mark.skipif(not operator.INTERPRETED, reason="counts the CPU's memory")
def test_extra_memory_stays_under_one_layer():
    config = dict(hidden_size=256, intermediate_size=1000, num_hidden_layers=6, vocab_size=8, num_attention_heads=4)
    with torch.profiler.profile(profile_memory=True) as profile:
        model = LlamaForCausalLM(LlamaConfig(**config)).eval()
        layer = sum(parameter.nbytes for parameter in mlps(model)[0].parameters())
        for action in (lambda: patch(model, "triton"), lambda: unpatch(model)):
            with torch.profiler.record_function("gluprune"):
                action()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans = [(event.start_ns(), event.end_ns()) for event in events if event.name() == "gluprune"]
    memory = [event for event in events if event.name() == "[memory]"]
    assert len(spans) == 2
    for start, end in spans:
        held = highest = 0
        for event in memory:
            if start <= event.start_ns() <= end:
                held += event.nbytes()
                highest = max(highest, held)
        assert layer / 4 < highest < layer and abs(held) < 6 * layer * 0.03


# --- reversible, local ---


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_unpatch_brings_back_the_exact_former_state(family, backend):
    model = tiny_model(family, device=DEVICE)
    before = snapshot(model)
    patch(model, backend)
    assert isinstance(mlps(model)[0], FusedGLU) and snapshot(model) != before
    assert unpatch(model) is model
    assert snapshot(model) == before
    assert snapshot(unpatch(model)) == before


def test_patching_keeps_tree_names_parameters_and_isinstance():
    model = tiny_model(device=DEVICE)
    names = [name for name, _ in model.named_modules()]
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    patch(model, "triton")
    assert [name for name, _ in model.named_modules()] == names
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(isinstance(mlp, LlamaMLP) for mlp in mlps(model))


def test_idempotent_and_switching_backends(kernel_calls):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    before, expected = snapshot(model), logits(model, ids)
    patch(model, "triton")
    once = snapshot(model)
    assert snapshot(patch(model, "triton")) == once
    patch(model, "cublas")
    logits(model, ids)
    assert kernel_calls == ["cublas"] * 2
    patch(model, "torch")
    assert torch.equal(logits(model, ids), expected) and not any(entry.fused for entry in fusion_status(model))
    assert not any(aligned.is_view(parameter) for parameter in model.parameters())
    assert snapshot(unpatch(model)) == before


def test_the_other_model_is_left_alone(kernel_calls):
    forward = LlamaMLP.forward
    patched, other, ids = tiny_model(device=DEVICE), tiny_model(device=DEVICE), token_ids(device=DEVICE)
    before = snapshot(other)
    patch(patched, "triton")
    assert snapshot(other) == before and LlamaMLP.forward is forward
    logits(other, ids)
    assert not kernel_calls
    assert_same(logits(patched, ids), logits(other, ids))
    unpatch(other)
    assert_fused(patched)


def test_models_that_share_their_layers_share_the_patch():
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    expected = logits(model, ids)
    patch(model.model, "triton")
    assert_fused(model)
    assert_same(logits(model, ids), expected)


def test_replaced_weights_are_noticed_and_patching_again_aligns_them(kernel_calls):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    patch(model, "triton")
    for mlp in mlps(model):
        mlp.up_proj.weight.data = mlp.up_proj.weight.data * 2
    expected = logits(model, ids)
    assert not kernel_calls and "patch again" in fusion_status(model)[0].reason
    patch(model, "triton")
    assert_fused(model)
    assert_same(logits(model, ids), expected)


def test_weights_in_a_foreign_buffer_stay_there():
    model = tiny_model(device=DEVICE)
    weight = mlps(model)[0].gate_proj.weight
    flat = torch.cat([weight.data.flatten(), torch.zeros(5, device=DEVICE)])
    weight.data = flat[:-5].view_as(weight)
    patch(model, "triton")
    assert weight.data_ptr() == flat.data_ptr()
    assert [entry.fused for entry in fusion_status(model)] == [False, True]


@pytest.mark.parametrize("order", ["prune first", "patch first"])
@pytest.mark.parametrize("family, multiple_of", [("llama", 1), ("llama", 8), ("phi3", 1)])
def test_prune_and_patch_in_either_order(order, family, multiple_of):
    """Narrowing gives a patched model new weights; they are aligned again without another call of `patch`."""
    model, ids = tiny_model(family, device=DEVICE), token_ids(device=DEVICE)
    reference = copy.deepcopy(model)
    gluprune.prune(reference, pruning_ratio=0.3, multiple_of=multiple_of)
    if order == "prune first":
        gluprune.prune(model, pruning_ratio=0.3, multiple_of=multiple_of)
        patch(model, "triton")
    else:
        patch(model, "triton")
        gluprune.prune(model, pruning_ratio=0.3, multiple_of=multiple_of)
    assert_fused(model)
    assert_same(logits(model, ids), logits(reference, ids))
    assert snapshot(unpatch(model)).keys() == snapshot(reference).keys()
    for ours, theirs in zip(model.parameters(), reference.parameters()):
        assert torch.equal(ours, theirs) and ours.untyped_storage().nbytes() == theirs.nbytes


# --- what is told ---


def test_one_line_in_the_log(caplog):
    model = tiny_model(device=DEVICE)
    mlps(model)[0].gate_proj.register_forward_hook(lambda *args: None)
    with caplog.at_level(logging.INFO, logger="gluprune"):
        patch(model, "triton")
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 MLPs are fused (backend triton); not fused: 1 x gate_proj carries a hook"
    ]


def test_status_as_data():
    model = tiny_model(device=DEVICE)
    assert [(entry.name, entry.fused, entry.reason) for entry in fusion_status(model)] == [
        ("model.layers.0.mlp", False, "not patched"),
        ("model.layers.1.mlp", False, "not patched"),
    ]
    patch(model, "torch")
    assert fusion_status(model)[0].reason == f"backend 'torch' runs PyTorch's operators on {DEVICE}"
    patch(model, "triton").train()
    assert "77 is no multiple of 128, and it is in training mode" in fusion_status(model)[0].reason
    assert fusion_status(nn.Linear(2, 2)) == []


# --- what is refused ---


class OwnMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + 1


def refused(model, message, error=ValueError, action=patch, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        action(model, **kwargs)
    assert snapshot(model) == before


def test_no_glu_in_the_model():
    with pytest.raises(ValueError, match="Linear holds no GLU MLP of a supported family: allowed are LlamaMLP"):
        patch(nn.Linear(2, 2))


def test_unsupported_activation():
    refused(tiny_model(hidden_act="gelu"), "activation GELUActivation is not supported .allowed are silu and gelu_pyt")


def test_not_a_module():
    for action in (patch, unpatch):
        with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
            action("model")


def test_unknown_backend():
    refused(tiny_model(), "unknown backend 'fast': allowed are auto, triton, cublas, torch", backend="fast")


@pytest.mark.parametrize("backend", ["triton", "cublas"])
def test_kernels_without_cuda_or_interpreter(backend, monkeypatch):
    monkeypatch.setattr(operator, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(tiny_model(), f"backend '{backend}' needs Triton and a CUDA device", backend=backend)
    monkeypatch.setattr(operator, "INTERPRETED", True)
    monkeypatch.setattr(operator, "HAS_TRITON", False)
    refused(tiny_model(), f"backend '{backend}' needs Triton and a CUDA device", backend=backend)


@pytest.mark.parametrize("action", [patch, unpatch])
def test_compiled_modules(action):
    model = tiny_model()
    with pytest.raises(ValueError, match="the model is compiled: patch and unpatch before torch.compile"):
        action(torch.compile(model))
    model.model.layers[1].compile()
    refused(model, "module 'model.layers.1' is compiled", action=action)


def test_own_subclasses_and_replaced_forwards_are_left(monkeypatch):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    mlps(model)[0].__class__ = OwnMLP
    expected = logits(model, ids)
    patch(model, "triton")
    assert type(mlps(model)[0]) is OwnMLP
    assert [entry.reason for entry in fusion_status(model)] == ["OwnMLP is a subclass of LlamaMLP", ""]
    assert_same(logits(model, ids), expected)

    model = tiny_model(device=DEVICE)
    mlps(model)[1].forward = lambda x: x
    expected = logits(model, ids)
    patch(model, "triton")
    assert [entry.reason for entry in fusion_status(model)] == ["", "its forward was replaced"]
    assert type(mlps(model)[1]) is LlamaMLP
    assert_same(logits(model, ids), expected)

    monkeypatch.setattr(LlamaMLP, "forward", OwnMLP.forward)
    refused(tiny_model(), "the forward of LlamaMLP was replaced by .*OwnMLP.forward")


def test_unpatch_refuses_a_class_that_was_wrapped_since():
    model = patch(tiny_model())
    mlp = mlps(model)[0]
    mlp.__class__ = type("Wrapped", (type(mlp),), {})
    refused(model, "model.layers.0.mlp became Wrapped after it was patched", action=unpatch)


def test_failure_in_the_middle_changes_nothing(monkeypatch):
    model = tiny_model(device=DEVICE)
    before, align = snapshot(model), aligned.align
    last = mlps(model)[1].gate_proj.weight

    def fail(gate, up, down):
        if gate is last:
            raise torch.OutOfMemoryError("no memory")
        align(gate, up, down)

    monkeypatch.setattr(aligned, "align", fail)
    with pytest.raises(torch.OutOfMemoryError):
        patch(model, "triton")
    assert snapshot(model) == before


def test_the_llama_names_are_the_general_ones():
    assert patch_llama is patch and unpatch_llama is unpatch
