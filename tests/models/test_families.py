"""The table of families, and the models it rejects."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import gluprune
from gluprune.models.families import REFUSED, family_of
from gluprune.models.glu import decoder_layers, model_glus


def test_glu_computes_what_the_model_computes(family_name, tiny_model):
    """The formula given by the table, in float64, equals the module's output."""
    model = tiny_model(family_name, torch.float64)
    for glu in model_glus(model):
        gate, up, down = glu.weights()
        x = torch.randn(2, 5, 32, dtype=torch.float64)
        biases = [glu.gate.bias, glu.up.bias, glu.down.bias]
        gate_bias, up_bias, down_bias = (0.0 if bias is None else bias for bias in biases)
        expected = (glu.activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias)) @ down.T + down_bias
        torch.testing.assert_close(glu.mlp(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model_type", ["bitnet", "falcon_h1", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_rejected_by_name(model_type):
    with pytest.raises(ValueError, match=f"'{model_type}' is not supported: .*; supported are llama, "):
        family_of(AutoConfig.for_model(model_type))


def test_gemma3n_is_rejected_with_its_reason():
    with pytest.raises(ValueError, match="'gemma3n_text' is not supported: Gemma 3n sparsifies"):
        family_of(AutoConfig.for_model("gemma3n_text"))


def test_rejected_and_supported_do_not_overlap():
    from gluprune.models.families import FAMILIES

    assert not FAMILIES.keys() & REFUSED.keys()


def test_a_model_without_a_glu_is_rejected(unchanged):
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    with unchanged(model), pytest.raises(ValueError, match="'gpt2' is not supported"):
        gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)


def test_not_a_model():
    with pytest.raises(
        ValueError, match="expected a Hugging Face causal LM, got str: load it first, with gluprune.load"
    ):
        gluprune.prune("narrow", pruning_ratio=0.2)
    with pytest.raises(ValueError, match="expected a Hugging Face causal LM, got Linear$"):
        gluprune.prune(nn.Linear(3, 4), pruning_ratio=0.5)


def test_an_mlp_of_another_class_is_rejected(tiny_model, unchanged):
    model = tiny_model()

    class Clamped(type(model.model.layers[1].mlp)):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    model.model.layers[1].mlp.__class__ = Clamped
    with unchanged(model), pytest.raises(ValueError, match="layer 1 holds Clamped where LlamaMLP was expected"):
        gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)


def test_bare_decoder(tiny_model):
    model = tiny_model()
    assert decoder_layers(model.model) is decoder_layers(model)
