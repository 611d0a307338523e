import copy
import logging

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import gluprune
from gluprune.runtime import aligned, operator
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import FusedGLU, patch, patch_llama, unpatch, unpatch_llama
from tests.helpers.patching import assert_fused, assert_same
from tests.helpers.tiny_models import DEVICE, logits, mlps, snapshot, tiny_model, token_ids


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_unpatch_restores_the_exact_state(family, backend):
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


def test_other_models_are_not_affected(kernel_calls):
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


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_replaced_weights_are_noticed_and_patching_again_aligns_them(kernel_calls, name):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    patch(model, "triton")
    for mlp in mlps(model):
        weight = getattr(mlp, name).weight
        weight.data = (weight.data * 2).contiguous()
    expected = logits(model, ids)
    assert not kernel_calls and "patch again" in fusion_status(model)[0].reason
    patch(model, "triton")
    assert_fused(model)
    assert_same(logits(model, ids), expected)


def test_weights_in_another_tensors_buffer_are_not_moved():
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
    """Narrowing replaces the weights of a patched model; they are aligned again without another call of `patch`."""
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


def test_a_patch_without_effect_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="gluprune"):
        patch(tiny_model(), "torch", norms=False)
    (record,) = caplog.records
    assert record.getMessage().startswith("0 of 2 MLPs and 0 of 5 norms are fused (backend torch); not fused: 2 x ")
    caplog.clear()
    model = tiny_model(device=DEVICE)
    for mlp in mlps(model):
        mlp.gate_proj.register_forward_hook(lambda *args: None)
    with caplog.at_level(logging.WARNING, logger="gluprune"):
        patch(model, "triton", norms=True)
    assert not caplog.records, "fused norms are an effect"


def test_one_line_in_the_log(caplog):
    model = tiny_model(device=DEVICE)
    mlps(model)[0].gate_proj.register_forward_hook(lambda *args: None)
    with caplog.at_level(logging.INFO, logger="gluprune"):
        patch(model, "triton")
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 MLPs and 0 of 5 norms are fused (backend triton); not fused: 1 x gate_proj has a hook"
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
    assert [entry.fused for entry in fusion_status(model)] == [True] * 2  # with a width of 77, too
    mlps(model)[0].gate_proj.weight.data = mlps(model)[0].gate_proj.weight.data.clone()
    assert fusion_status(model)[0].reason == "its weights are not in aligned storage: patch again"
    assert fusion_status(nn.Linear(2, 2)) == []


class OwnMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + 1


def refused(model, message, error=ValueError, action=patch, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        action(model, **kwargs)
    assert snapshot(model) == before


def test_no_glu_in_the_model():
    with pytest.raises(ValueError, match="Linear holds no GLU MLP of a supported family; allowed: LlamaMLP"):
        patch(nn.Linear(2, 2))


def test_unsupported_activation():
    refused(tiny_model(hidden_act="gelu"), "activation GELUActivation is not supported .allowed: silu and gelu_pyt")


def test_not_a_module():
    for action in (patch, unpatch):
        with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
            action("model")


def test_unknown_backend():
    refused(tiny_model(), "unknown backend 'fast'; allowed: auto, triton, cublas, torch", backend="fast")


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


def test_subclasses_and_replaced_forwards_are_not_patched(monkeypatch):
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


def test_unpatch_rejects_a_class_that_was_wrapped_after_patching():
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


def test_the_llama_names_are_aliases():
    assert patch_llama is patch and unpatch_llama is unpatch
