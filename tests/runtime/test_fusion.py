"""Each single reason that keeps an MLP or a norm from running fused, with everything else in order."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import gluprune
from gluprune.runtime import fusion, operator
from tests.helpers.tiny_models import DEVICE, mlps, tiny_model

H = 48


class Own(torch.Tensor):
    """A tensor of another library."""


def own(tensor):
    return tensor.as_subclass(Own)


@pytest.fixture
def mlp():
    return mlps(gluprune.patch(tiny_model(mlp_bias=True, device=DEVICE), "triton", norms=True))[0]


@pytest.fixture
def norm():
    return gluprune.patch(tiny_model(device=DEVICE), "triton", norms=True).model.norm


@pytest.fixture
def x():
    return torch.randn(2, 3, H, device=DEVICE)


INPUTS = {
    "another kind of tensor": own,
    "sparse": lambda x: x.to_sparse(),
    "dtype": lambda x: x.half(),
    "layout of mkldnn": lambda x: x.cpu().to_mkldnn(),  # says that it is contiguous
    "width": lambda x: x[..., :1].contiguous(),
    "negated view": torch._neg_view,
}
NORM_INPUTS = {
    **INPUTS,
    "rows apart": lambda x: x.transpose(0, 1),
    "empty": lambda x: x[:0],
    "gradient wanted": lambda x: x.clone().requires_grad_(),
}


def check_inputs(is_fusible, module, x, change):
    module.requires_grad_(False)
    assert is_fusible(module, x)
    assert not is_fusible(module, change(x))


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_an_mlp(mlp, x, name):
    check_inputs(fusion.is_fusible, mlp, x, INPUTS[name])


@pytest.mark.parametrize("name", NORM_INPUTS)
def test_inputs_of_a_norm(norm, x, name):
    check_inputs(fusion.is_norm_fusible, norm, x, NORM_INPUTS[name])


SURROUNDINGS = {
    "tracing": [(torch.jit, "is_tracing"), (torch._C, "_is_tracing")],
    "intercepted": [(fusion, "is_intercepted")],
    "functorch": [(torch._C, "_are_functorch_transforms_active")],
}


@pytest.mark.parametrize("name", SURROUNDINGS)
@torch.no_grad()
def test_surroundings(mlp, norm, x, name, monkeypatch):
    assert fusion.is_fusible(mlp, x) and fusion.is_norm_fusible(norm, x)
    for place in SURROUNDINGS[name]:
        monkeypatch.setattr(*place, lambda: True)
    assert not fusion.is_fusible(mlp, x) and not fusion.is_norm_fusible(norm, x)


@torch.no_grad()
def test_devices(mlp, norm, x, monkeypatch):
    """Another device than that of the weights, and one without kernels."""
    assert fusion.is_fusible(mlp, x) and fusion.is_norm_fusible(norm, x)
    monkeypatch.setattr(operator, "uses_kernels", lambda backend, device: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    assert not fusion.is_fusible(mlp, x.to("meta")) and not fusion.is_norm_fusible(norm, x.to("meta"))
    monkeypatch.setattr(operator, "uses_kernels", lambda backend, device: False)
    assert not fusion.is_fusible(mlp, x) and not fusion.is_norm_fusible(norm, x)


def set_weights(mlp, change):
    for name in ("gate_proj", "up_proj", "down_proj"):
        projection = getattr(mlp, name)
        projection.weight = nn.Parameter(change(projection.weight.detach()))


DIFFER, SHAPES = "the weights differ in dtype, device or kind", "the weights' shapes do not fit together"
WEIGHTS = {
    "kind of a bias": (lambda m: setattr(m.up_proj, "bias", nn.Parameter(own(m.up_proj.bias.detach()))), DIFFER),
    "dtype of one": (lambda m: m.up_proj.half(), DIFFER),
    "device of one": (lambda m: m.up_proj.to("meta"), DIFFER),
    "rows that broadcast": (
        lambda m: (
            setattr(m.up_proj, "weight", nn.Parameter(m.up_proj.weight.detach()[:1])),
            m.up_proj._parameters.update(bias=None),
        ),
        SHAPES,
    ),
    "width of down": (
        lambda m: setattr(m.down_proj, "weight", nn.Parameter(m.down_proj.weight.detach()[:, :-1])),
        SHAPES,
    ),
    "vectors": (lambda m: (set_weights(m, lambda w: w.flatten()[:1]), clear_biases(m)), SHAPES),
}


def clear_biases(mlp):
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(mlp, name)._parameters["bias"] = None


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_an_mlp(mlp, name):
    change, reason = WEIGHTS[name]
    assert fusion.module_obstacle(mlp) is None
    change(mlp)
    assert fusion.module_obstacle(mlp) == reason


NORM_WEIGHTS = {
    "kind": own,
    "columns apart": lambda w: w.repeat_interleave(2)[::2],
    "a number": lambda w: w[0],
}


@pytest.mark.parametrize("name", NORM_WEIGHTS)
@torch.no_grad()
def test_weights_of_a_norm(norm, x, name):
    assert fusion.is_norm_fusible(norm, x)
    norm.weight = nn.Parameter(NORM_WEIGHTS[name](norm.weight.detach()))
    assert not fusion.is_norm_fusible(norm, x[0, 0, 0] if name == "a number" else x)


@torch.no_grad()
def test_what_the_kernel_of_norms_cannot_take(norm, x, monkeypatch):
    assert fusion.is_norm_fusible(norm, x)
    assert not fusion.is_norm_fusible(norm.double(), x.double())
    if operator.INTERPRETED:
        assert not fusion.is_norm_fusible(norm.bfloat16(), x.bfloat16()), "the interpreter truncates"
    norm.float()
    monkeypatch.setattr(operator.layout, "MOST_NORM_COLUMNS", H - 1)
    assert not fusion.is_norm_fusible(norm, x)


def test_replaced_forwards(mlp, monkeypatch):
    """Of one patched MLP; of the class, by one of the same name or of the same module."""
    mlp.forward = lambda x: x
    assert fusion.fusion_status(mlp)[0].reason == "its forward was replaced"

    def forward(self, x):
        return x

    forward.__qualname__ = "LlamaMLP.forward"
    monkeypatch.setattr(mlp.original_class, "forward", forward)
    assert fusion.class_obstacle(mlp) == f"the forward of LlamaMLP was replaced by {__name__}.LlamaMLP.forward"
    monkeypatch.setattr(mlp.original_class, "forward", LlamaRMSNorm.forward)
    assert "was replaced by transformers.models.llama" in fusion.class_obstacle(mlp)


def test_hooks_of_accelerate_that_do_more_than_move_inputs(mlp):
    add_hook_to_module(mlp, AlignDevicesHook(DEVICE))
    assert fusion.fusion_status(mlp)[0].fused
    add_hook_to_module(mlp, ModelHook())
    assert fusion.fusion_status(mlp)[0].reason == "its forward was replaced"


@torch.no_grad()
def test_an_activation_that_is_no_submodule(mlp, x):
    """The MLP runs fused but keeps no launches: the guards look for activations among the submodules."""
    mlp.__dict__["act_fn"] = mlp._modules.pop("act_fn")
    for _ in range(2):
        torch.testing.assert_close(mlp(x), mlp.original_class.forward(mlp, x), atol=2e-5, rtol=2e-5)
    assert mlp.__dict__["_prepared"] is None


def test_torch_compile_traces_function_modes_by_itself(monkeypatch):
    with TorchFunctionMode():
        assert fusion.is_intercepted()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not fusion.is_intercepted()
