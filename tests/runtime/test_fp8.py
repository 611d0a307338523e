"""Models with fp8 weights: they compute with the rounded weights, on every path, and save and restore these."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import gluprune
from gluprune.runtime import fp8, operator
from gluprune.runtime.classes import PREPARED
from gluprune.runtime.fp8 import Fp8Linear
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.graphs import _fingerprint
from gluprune.runtime.patching import patch, unpatch
from gluprune.runtime.rounding import NO_GRADIENT, dequantize, quantize
from tests.helpers.marks import each_family, slow
from tests.helpers.patching import assert_fused, assert_same
from tests.helpers.poison import poison_empty
from tests.helpers.tiny_models import DEVICE, logits, mlps, tiny_model, token_ids

interpreted = pytest.mark.skipif(not operator.INTERPRETED, reason="runs in Triton's interpreter")
# The interpreter's dot reads bf16 as integers.
DTYPES = [torch.float32, *slow(torch.float16), *([] if operator.INTERPRETED else [torch.bfloat16])]
NAMES = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def rounded(model):
    """A copy of a model with the rounded weights in its own dtype."""
    result = copy.deepcopy(model)
    for name, parameter in result.named_parameters():
        if any(f"mlp.{projection}.weight" in name for projection in NAMES):
            parameter.data = dequantize(*quantize(parameter.data))
    return result


def parameters_of(model):
    return {name: parameter.clone() for name, parameter in model.state_dict().items()}


@pytest.mark.parametrize("family", each_family())
@pytest.mark.parametrize("width", [77, *slow(128)])
def test_computes_with_the_rounded_weights(family, width):
    model, ids = tiny_model(family, width=width), token_ids()
    stock, expected = logits(model, ids), logits(rounded(model), ids)
    assert patch(model, "torch", weights="fp8") is model
    assert torch.equal(logits(model, ids), expected) and not torch.equal(stock, expected)
    assert all(type(mlp.down_proj) is Fp8Linear for mlp in mlps(model))


@pytest.mark.parametrize("family", ["llama", *slow("phi3", "gemma2")])
@pytest.mark.parametrize("backend", ["triton", *slow("cublas")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused(family, backend, dtype, kernel_calls, monkeypatch):
    model, ids = tiny_model(family, dtype=dtype, device=DEVICE), token_ids(device=DEVICE)
    one, many = ids[:1, :1], token_ids(3, 44, device=DEVICE)
    reference = rounded(model)
    expected = [logits(reference, tokens) for tokens in (ids, one, many)]
    patch(model, backend, weights="fp8")
    assert_fused(model)
    poison_empty(monkeypatch)
    for _ in range(2):  # launches are kept
        for tokens, logit in zip((ids, one, many), expected):
            assert_same(logits(model, tokens), logit, dtype)
    assert kernel_calls == [backend] * 12


def test_training_mode_runs_fused_at_any_width(kernel_calls):
    model, ids = tiny_model(width=77, device=DEVICE), token_ids(device=DEVICE)
    expected = logits(rounded(model), ids)
    patch(model, "triton", weights="fp8").train()
    assert_fused(model)
    assert_same(logits(model, ids), expected)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize("family", ["llama", *slow("phi3")])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_no_gradient(family, backend):
    model, ids = patch(tiny_model(family), backend, weights="fp8"), token_ids()
    output = model(ids).logits  # the embedding takes a gradient
    assert output.requires_grad
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        output.sum().backward()
    assert not any(parameter.requires_grad for mlp in mlps(model) for parameter in mlp.parameters())


@pytest.mark.parametrize("family", ["llama", *slow("phi3")])
@pytest.mark.parametrize(
    "backend, dtype", [("torch", torch.bfloat16), pytest.param("triton", torch.float32, marks=interpreted)], ids=str
)
def test_a_checkpoint_has_the_rounded_weights(family, backend, dtype, tmp_path):
    model, ids = tiny_model(family, dtype=dtype), token_ids()
    expected = rounded(model)
    patch(model, backend, weights="fp8")
    for keep_vars in (False, True):
        state = model.state_dict(keep_vars=keep_vars)
        assert list(state) == list(expected.state_dict())
        assert all(torch.equal(state[name], weight) for name, weight in expected.state_dict().items())
        assert all(state[name].dtype == dtype and state[name].is_contiguous() for name in state)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() <= expected.state_dict().keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(loaded, ids), logits(expected, ids))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_loads_no_state_dict(strict, assign):
    model, ids = tiny_model(), token_ids()
    state = copy.deepcopy(model.state_dict())
    patch(model, "torch", weights="fp8")
    expected = logits(model, ids)
    with pytest.raises(RuntimeError, match="mlp.gate_proj.weight is fp8, which no weights can be loaded into: unpatch"):
        model.load_state_dict(state, strict=strict, assign=assign)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_unpatch_restores_linear_layers(backend):
    model, ids = tiny_model(), token_ids()
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    expected, training = rounded(model), model.model.layers[1].mlp.up_proj.train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    unpatch(patch(model, backend, weights="fp8"))
    assert all(type(mlp.gate_proj) is nn.Linear and type(mlp).__name__ == "LlamaMLP" for mlp in mlps(model))
    assert torch.equal(logits(model, ids), logits(expected, ids))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not any(flags[name] for name in flags if "layers.0.mlp.down" in name)
    assert model.model.layers[1].mlp.up_proj.training and training.training
    assert not model.model.layers[0].mlp.up_proj.training
    state = parameters_of(model)
    patch(model, backend, weights="fp8")  # rounds to the same
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


def test_biases_stay_the_same_parameters():
    model = tiny_model("llama", mlp_bias=True)
    biases = [mlp.down_proj.bias for mlp in mlps(model)]
    patch(model, "torch", weights="fp8")
    assert all(mlp.down_proj.bias is bias for mlp, bias in zip(mlps(model), biases))
    unpatch(model)
    assert all(mlp.down_proj.bias is bias for mlp, bias in zip(mlps(model), biases))


def test_patching_again():
    model, ids = patch(tiny_model(), "torch"), token_ids()
    expected = logits(rounded(model), ids)
    patch(model, "torch", weights="fp8")
    projections = [mlp.up_proj for mlp in mlps(model)]
    for weights in ("fp8", None):  # None leaves the weights as they are
        patch(model, "auto", weights=weights)
        assert torch.equal(logits(model, ids), expected)
        assert all(mlp.up_proj is projection for mlp, projection in zip(mlps(model), projections))


def test_half_the_bytes():
    model = tiny_model(dtype=torch.bfloat16, width=128)
    before = sum(parameter.nbytes for mlp in mlps(model) for parameter in mlp.parameters())
    patch(model, "torch", weights="fp8")
    weights = [parameter for mlp in mlps(model) for parameter in mlp.parameters() if parameter.dim() == 2]
    assert 2 * sum(weight.nbytes for weight in weights) == before


def test_log(caplog):
    with caplog.at_level("INFO", "gluprune"):
        patch(tiny_model(), weights="fp8")
    assert "2 MLPs with fp8 weights" in caplog.text


def hooked(layer):
    layer.register_forward_hook(lambda *args: None)


def replaced(layer):
    layer.forward = lambda x: x


def large(layer):
    layer.weight.data[0, 0] = 57345


def infinite(layer):
    layer.weight.data[-1, -1] = float("inf")


def broken(layer):
    layer.weight.data[-1, -1] = float("nan")


@pytest.mark.parametrize(
    "change, message",
    [
        (hooked, "it has a hook"),
        (replaced, "it has a hook"),
        (large, "the largest magnitude of its weight is 57345; allowed: 57344"),
        (infinite, "the largest magnitude of its weight is inf; allowed: 57344"),
        (broken, "the largest magnitude of its weight is nan; allowed: 57344"),
        (lambda layer: layer.double(), "its weight is float64; allowed: bfloat16, float16, float32"),
        (lambda layer: layer.to("meta"), "its weight is sharded, offloaded or not loaded"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_rounded(change, message):
    model = tiny_model()
    change(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=f"model.layers.1.mlp.up_proj cannot have fp8 weights: {message}"):
        patch(model, "torch", weights="fp8")
    assert all(type(mlp).__name__ == "LlamaMLP" and type(mlp.gate_proj) is nn.Linear for mlp in mlps(model))


def test_other_layers_are_not_rounded():
    model = tiny_model()
    model.model.layers[0].mlp.gate_proj = nn.Sequential(model.model.layers[0].mlp.gate_proj)
    with pytest.raises(ValueError, match="layers.0.mlp.gate_proj cannot have fp8 weights: it is torch's Sequential"):
        patch(model, "torch", weights="fp8")


@pytest.mark.parametrize("capability, is_old", [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_old_gpus(monkeypatch, capability, is_old):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = fp8.too_old(torch.device("cuda:1"))
    wanted = f"fp8 needs a GPU of compute capability 8.9, cuda:1 has {capability[0]}.{capability[1]}"
    assert reason == (wanted if is_old else None)
    assert fp8.too_old(torch.device("cpu")) is None


def test_an_old_gpu_is_refused_before_anything_is_changed(monkeypatch):
    model, ids = tiny_model(), token_ids()
    expected = logits(model, ids)
    monkeypatch.setattr(fp8, "too_old", lambda device: "fp8 needs a newer GPU")
    with pytest.raises(ValueError, match="layers.0.mlp.gate_proj cannot have fp8 weights: fp8 needs a newer GPU"):
        patch(model, weights="fp8")
    assert torch.equal(logits(model, ids), expected) and type(mlps(model)[0]).__name__ == "LlamaMLP"


@interpreted
def test_moved_to_an_old_gpu_it_calls_its_projections(monkeypatch, kernel_calls):
    model, ids = patch(tiny_model(), "triton", weights="fp8"), token_ids()
    monkeypatch.setattr(fp8, "too_old", lambda device: "fp8 needs a newer GPU")
    assert [entry.reason for entry in fusion_status(model)] == ["fp8 needs a newer GPU"] * 2
    assert torch.equal(logits(model, ids), logits(unpatch(copy.deepcopy(model)), ids)) and not kernel_calls


@pytest.mark.parametrize("weights", ["int8", "", "FP8", True])
def test_unknown_weights(weights):
    with pytest.raises(ValueError, match=f"unknown weights {weights!r}; allowed: None, 'fp8'"):
        patch(tiny_model(), weights=weights)


def test_no_pruning():
    model = patch(tiny_model(), weights="fp8")
    with pytest.raises(ValueError, match="Fp8Linear, not nn.Linear: quantized or adapted projections cannot be pruned"):
        gluprune.prune(model, pruning_ratio=0.4)
    gluprune.prune(unpatch(model), pruning_ratio=0.4, multiple_of=1)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_a_pruned_model(backend):
    model, ids = tiny_model(width=150), token_ids()
    gluprune.prune(model, pruning_ratio=0.4, multiple_of=1)
    expected = logits(rounded(model), ids)
    patch(model, backend, weights="fp8")
    assert_same(logits(model, ids), expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_another_dtype_is_exact(backend):
    model, ids = tiny_model(dtype=torch.float16), token_ids()
    expected = rounded(model).float()
    patch(model, backend, weights="fp8").float()
    assert_same(logits(model, ids), logits(expected, ids))
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in expected.state_dict().items())
    weight = model.model.layers[0].mlp.up_proj
    assert weight.weight.dtype == torch.uint8 and weight.scale.dtype == torch.float32
    if backend == "triton":
        assert_fused(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_copies(copied, backend):
    model, ids = patch(tiny_model(), backend, weights="fp8"), token_ids()
    expected = logits(model, ids)
    other = copied(model)
    unpatch(model)
    assert torch.equal(logits(other, ids), expected)
    if backend == "triton":
        assert_fused(other)


@interpreted
def test_kept_launches_notice_changes(kernel_calls):
    """Scales and weights are read at every launch; a replaced module is examined again."""
    mlp = mlps(patch(tiny_model(), "triton", weights="fp8"))[0]
    x = torch.randn(1, 3, 48)

    def output():
        with torch.no_grad():
            return mlp(x)

    first = output()
    assert torch.equal(output(), first) and len(kernel_calls) == 2
    mlp.down_proj.scale.mul_(2)
    torch.testing.assert_close(output(), 2 * first)
    kept = vars(mlp)[PREPARED]  # a launch bound to addresses must not outlive the scale
    assert kept.holds(mlp)
    mlp.down_proj.scale = nn.Parameter(mlp.down_proj.scale / 2, requires_grad=False)
    assert not kept.holds(mlp)
    torch.testing.assert_close(output(), first)
    mlp.down_proj.weight.zero_()
    assert output().eq(0).all()
    mlp.down_proj = mlp.down_proj.to_linear()
    assert [entry.reason for entry in fusion_status(mlp)] == ["only some of the weights are fp8"]
    assert output().eq(0).all() and len(kernel_calls) == 5
    mlp.gate_proj.scale.data = mlp.gate_proj.scale.half()
    mlp.down_proj = Fp8Linear(mlp.down_proj)
    assert [entry.reason for entry in fusion_status(mlp)] == ["the weights differ in dtype, device or kind"]


@interpreted
def test_hooks_are_called(kernel_calls):
    model, ids = patch(tiny_model(), "triton", weights="fp8"), token_ids()
    expected, seen = logits(model, ids), []
    handle = mlps(model)[0].down_proj.register_forward_hook(lambda *args: seen.append(1))
    assert_same(logits(model, ids), expected)
    assert seen == [1] and fusion_status(model)[0].reason == "down_proj has a hook"
    handle.remove()
    assert torch.equal(logits(model, ids), expected) and seen == [1]


def test_captured_graphs_depend_on_the_weights():
    model = patch(tiny_model(), "torch")
    before = _fingerprint(model)
    patch(model, "torch", weights="fp8")
    assert _fingerprint(model) != before
    assert {mlp.up_proj.scale.data_ptr() for mlp in mlps(model)} <= {
        address for entry in _fingerprint(model) for address in (entry if isinstance(entry, tuple) else ())
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=interpreted)])
def test_compile(backend):
    torch.compiler.reset()
    model, ids = tiny_model(num_hidden_layers=1), token_ids()
    expected = logits(rounded(model), ids)
    compiled = torch.compile(patch(model, backend, weights="fp8"), fullgraph=True, backend="aot_eager")
    assert_same(logits(compiled, ids), expected)


def test_operator_on_any_device():
    """Without kernels the operator dequantizes; every dtype has its own tolerance."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        gate, up, down = (quantize(torch.randn(shape).to(dtype)) for shape in ((77, 48), (77, 48), (48, 77)))
        x, bias = torch.randn(2, 3, 48).to(dtype), torch.randn(48).to(dtype)
        bits, scales = zip(gate, up, down)
        y = operator.glu_mlp(x, *bits, None, None, bias, "silu", "torch", *scales)
        g, u, d = (w.view(torch.float8_e4m3fn).double() * s.double()[:, None] for w, s in (gate, up, down))
        hidden = nn.functional.silu(x.double() @ g.t()) * (x.double() @ u.t())
        exact = hidden @ d.t() + bias.double()
        assert ((y.double() - exact).abs().max() / exact.abs().max()).item() < tolerance and y.dtype == dtype
