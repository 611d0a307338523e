"""Norms that `patch` fuses: the same bits as the family's own code, and every change takes effect at the next call."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gluprune
from gluprune.runtime import fusion, operator, prepared
from gluprune.runtime.norms import FusedNorm
from tests.helpers.marks import each_family
from tests.helpers.tiny_models import DEVICE, gradients, logits, tiny_model, token_ids

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def norms(model):
    return [module for module in model.modules() if fusion.norm_class(module) is not None]


@pytest.fixture
def prepared_calls(monkeypatch):
    """The norms whose calls were prepared."""
    taken, run = [], prepared.Prepared.run

    def noted(self, module, x):
        if isinstance(module, FusedNorm):
            taken.append(module)
        return run(self, module, x)

    monkeypatch.setattr(prepared.Prepared, "run", noted)
    return taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", each_family())
@torch.no_grad()
def test_the_bits_of_every_family(family, dtype, prepared_calls):
    """Of every norm of a model, on inputs whose sum of squares is exact in any order."""
    config = AutoConfig.for_model(
        family,
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(DEVICE)
    found = norms(model)
    assert len(found) >= 3, "two of the layer and the last one"
    assert len(found) == sum("Norm" in type(module).__name__ for module in model.modules())
    for norm in found:
        torch.nn.init.normal_(norm.weight)
    stock = copy.deepcopy(found)
    gluprune.patch(model, "triton", norms=True)
    for norm, original in zip(found, stock, strict=True):
        assert isinstance(norm, FusedNorm)
        for tokens in (1, 1, 5):
            x = torch.randint(-16, 17, (1, tokens, *norm.weight.shape)).to(DEVICE, dtype) / 8
            assert torch.equal(norm(x), original(x))
    # Triton's interpreter truncates to bfloat16, so there the eager code runs.
    assert len(prepared_calls) == (0 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2 * len(found))
    classes = [type(norm) for norm in norms(gluprune.unpatch(model))]
    assert classes == [type(original) for original in stock]


@pytest.fixture
def model():
    return tiny_model(device=DEVICE)


def test_a_whole_model(model, prepared_calls):
    ids = token_ids(device=DEVICE)
    expected = logits(model, ids)
    gluprune.patch(model, "triton", norms=True)
    for _ in range(3):
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    assert len(prepared_calls) == 2 * 5


def test_gradients_are_those_of_the_eager_code(model):
    ids = token_ids(device=DEVICE)
    expected = gradients(model, ids)
    gluprune.patch(model, "triton", norms=True)
    logits(model, ids)
    found = gradients(model, ids)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)


def warm_norm(model, prepared_calls):
    """A patched norm whose call is prepared, an input and the output."""
    gluprune.patch(model, "triton", norms=True)
    norm = norms(model)[0]
    x = torch.randn(1, 3, 48, device=DEVICE)
    with torch.no_grad():
        norm(x)
        y = norm(x)
    assert prepared_calls == [norm]
    prepared_calls.clear()
    return norm, x, y


def set_data(norm):
    norm.weight.data = 2 * norm.weight.data


CHANGES = {
    "weight": lambda norm: setattr(norm, "weight", torch.nn.Parameter(2 * norm.weight.detach())),
    "data": set_data,
    "epsilon": lambda norm: setattr(norm, "variance_epsilon", 10.0),
    "dtype": lambda norm: norm.to(torch.float64),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_takes_effect_at_the_next_call(model, name, prepared_calls):
    norm, x, before = warm_norm(model, prepared_calls)
    CHANGES[name](norm)
    expected = norm.original_class.forward(norm, x)
    assert expected.dtype != before.dtype or not torch.allclose(before, expected)
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-6)
    assert not prepared_calls


@torch.no_grad()
def test_weights_changed_in_place_need_no_other_launch(model, prepared_calls):
    norm, x, before = warm_norm(model, prepared_calls)
    norm.weight.mul_(2)
    torch.testing.assert_close(norm(x), 2 * before, atol=1e-6, rtol=1e-6)
    assert prepared_calls == [norm]


@torch.no_grad()
def test_other_inputs(model, prepared_calls):
    norm, x, _ = warm_norm(model, prepared_calls)
    flat = torch.randn(3 * 48 + 1, device=DEVICE)
    for other in (x.transpose(0, 1), torch.randn(3, 96, device=DEVICE)[:, ::2], flat[1:].view(3, 48), x[:, :0]):
        torch.testing.assert_close(norm(other), norm.original_class.forward(norm, other), atol=1e-6, rtol=1e-6)
    for other in (x.double(), x.half(), torch._neg_view(x)):
        assert torch.equal(norm(other), norm.original_class.forward(norm, other))
    torch.testing.assert_close(torch.vmap(norm)(x[0])[None], norm(x), atol=1e-6, rtol=1e-6)


def test_x_that_requires_a_gradient(model, prepared_calls):
    norm, x, _ = warm_norm(model, prepared_calls)
    norm.requires_grad_(False)
    x = x.clone().requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None and not prepared_calls


def test_norms_are_left_where_asked(model):
    for wanted, expected in ((True, 5), (None, 5 * (DEVICE == "cuda")), (True, 5), (False, 0)):
        gluprune.patch(model, "triton", norms=wanted)
        assert sum(isinstance(module, FusedNorm) for module in model.modules()) == expected
    gluprune.patch(model, "torch", norms=True)
    assert not any(isinstance(module, FusedNorm) for module in model.modules())


def test_a_norm_with_another_forward_is_left(model, monkeypatch):
    owner = fusion.norm_class(norms(model)[0])
    monkeypatch.setattr(owner, "forward", lambda self, x: 2 * x)
    gluprune.patch(model, "triton", norms=True)
    assert not any(isinstance(module, FusedNorm) for module in model.modules())


def test_copies(model, prepared_calls):
    norm, x, y = warm_norm(model, prepared_calls)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is type(norm) and "_prepared" not in vars(other)
        with torch.no_grad():
            torch.testing.assert_close(other(x), y)


@pytest.mark.slow
@pytest.mark.skipif(not operator.INTERPRETED, reason="compiles for the CPU")
def test_compiled_models_run_the_eager_norm(model):
    ids = token_ids(device=DEVICE)
    expected = logits(model, ids)
    gluprune.patch(model, "triton", norms=True)
    logits(model, ids)
    torch.testing.assert_close(
        logits(torch.compile(model, fullgraph=True, backend="eager"), ids), expected, atol=1e-5, rtol=1e-5
    )
