"""Patched models under torch.compile, export and tracing, and SmolLM2."""

import copy
import json
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import gluprune
from gluprune.runtime import operator
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import patch, unpatch
from tests.helpers.interop import assert_same, reasons
from tests.helpers.tiny_models import DEVICE, assert_unchanged, gradients, logits, mlps, snapshot, tiny_model, token_ids


@pytest.mark.slow
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


@pytest.mark.slow
def test_compiled_transforms_are_those_of_the_modules():
    (mlp, _), x, tangent = mlps(tiny_model(device=DEVICE, width=128)), *torch.randn(2, 3, 48, device=DEVICE)
    mlp.requires_grad_(False)
    transforms = {
        "jvp": lambda x: torch.func.jvp(mlp, (x,), (tangent,)),
        "grad": lambda x: (torch.func.grad(lambda y: mlp(y).sum())(x),),
        "vmap": lambda x: (torch.vmap(mlp)(x),),
    }
    expected = {name: transform(x) for name, transform in transforms.items()}
    patch(mlp, "triton")
    for name, transform in transforms.items():
        for ours, theirs in zip(torch.compile(transform, backend="eager")(x), expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compile_with_a_changing_number_of_tokens():
    torch.compiler.reset()
    model = tiny_model(device=DEVICE, num_hidden_layers=1)
    patch(model, "triton")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((2, 7), (3, 5), (1, 9)):
        ids = token_ids(batch, length, device=DEVICE)
        assert_same(logits(compiled, ids), logits(model, ids))


def test_a_function_that_is_not_compiled_calls_the_operator_untraced(monkeypatch):
    """Dynamo skips a frame with a graph break inside a loop, and then looks at all frames that it calls."""
    torch.compiler.reset()
    monkeypatch.setattr(operator, "_replays", {})
    (mlp, _), x = mlps(patch(tiny_model(device=DEVICE), "cublas")), torch.randn(3, 48, device=DEVICE)
    weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)

    def twice(x):
        for _ in range(2):
            torch._dynamo.graph_break()
            x = torch.ops.gluprune.glu_mlp.default(x, *weights, None, None, None, "silu", "cublas")
        return x

    with torch.no_grad():
        assert_same(torch.compile(twice, backend="eager")(x), mlp(mlp(x)))


@pytest.mark.slow
@pytest.mark.parametrize("width", [77, 128])
def test_compiled_training(ids, width):
    torch.compiler.reset()
    model = tiny_model(width=width, device=DEVICE).train()
    expected = gradients(model, ids)
    patch(model, "triton")
    assert reasons(model) == ["", ""]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_operator_accepts_weights_that_left_their_storage(model, ids):
    torch.compiler.reset()
    patch(model, "triton")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = logits(compiled, ids)
    for mlp in mlps(model):
        mlp.gate_proj.weight.data = mlp.gate_proj.weight.data.clone()
    assert_same(logits(compiled, ids), expected)


def test_patching_resets_the_compiler(model, monkeypatch):
    """Once for each change, and not if nothing changes: a reset makes other models compile again."""
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


@pytest.mark.slow
def test_patching_inside_a_compiled_function_recompiles(model, ids, kernel_calls):
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


@pytest.mark.slow
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


def test_a_jit_trace_contains_pytorchs_operators(model):
    patch(model, "triton")
    mlp = mlps(model)[0]
    x, other = torch.randn(2, 5, 48, device=DEVICE)
    with torch.no_grad():
        traced = torch.jit.trace(mlp, x)
        assert "gluprune::" not in str(traced.inlined_graph)
        assert_same(traced(other), mlp(other))


@pytest.mark.skipif(not operator.INTERPRETED, reason="bit-equal only on the CPU")
def test_smollm2_on_the_cpu_generates_the_same(smollm2_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2_path).eval()
    ids = torch.randint(0, 40000, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = logits(model, ids)
    patch(model)
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path)
    assert (smollm2_path / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    configs = [json.loads((folder / "config.json").read_bytes()) for folder in (smollm2_path, tmp_path)]
    for config in configs:
        config.pop("transformers_version")  # the cached model may have been written by another version
    assert configs[0] == configs[1]


@pytest.mark.slow
@pytest.mark.skipif(not operator.INTERPRETED, reason="float32 sums in another order may choose other tokens")
@pytest.mark.parametrize("ratio, width", [(None, 1536), (0.4, 922)])
def test_smollm2_fused_generates_the_same(smollm2_path, tmp_path, ratio, width):
    """The whole model in aligned storage: its tokens and checkpoint are the same, and unpatching restores it."""
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


@pytest.mark.slow
@pytest.mark.skipif(not operator.INTERPRETED, reason="needs the interpreter")
def test_one_smollm2_layer_fused(smollm2_path):
    """Real weights of real size: the first layer's MLP in float32."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32, num_hidden_layers=1).eval()
    ids = torch.randint(0, 40000, (1, 3), generator=torch.Generator().manual_seed(0))
    expected = logits(model, ids)
    patch(model, "triton")
    assert reasons(model) == [""]
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-4, rtol=1e-4)
