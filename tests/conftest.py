"""Shared test set-up. Without a CUDA device the kernels run in Triton's interpreter, chosen before triton is imported."""

import os
from contextlib import contextmanager

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from gluprune.families import FAMILIES  # noqa: E402
from gluprune.smollm2 import smollm2_checkpoint  # noqa: E402


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def smollm2_path():
    """Folder of the real SmolLM2-135M-Instruct in bf16 (made in the user's cache on first use)."""
    return smollm2_checkpoint()


@pytest.fixture
def smollm2(smollm2_path):
    return AutoModelForCausalLM.from_pretrained(smollm2_path).eval()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_path):
    return AutoTokenizer.from_pretrained(smollm2_path)


def make_tiny_model(model_type="llama", dtype=torch.float32, seed=None, **overrides):
    """A random model of a supported family: hidden size 32, 101 neurons, 3 layers, biases where the family has them."""
    settings = dict(
        hidden_size=32,
        intermediate_size=101,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    settings.update(overrides)
    if seed is not None:
        torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=dtype).eval()
    for name, parameter in model.named_parameters():  # transformers starts biases at zero, where a mistake would not show
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def tiny_model():
    return make_tiny_model


@pytest.fixture(params=list(FAMILIES))
def family_name(request):
    return request.param


def snapshot(model):
    """Everything that `prune` may change: tensors, identities, attributes and config values."""
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "gradients": {name: id(parameter.grad) for name, parameter in model.named_parameters()},
        "config": model.config.to_dict(),
        "attributes": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, bool))}
            for name, module in model.named_modules()
        },
    }


def assert_same(model, before):
    """The model must be exactly what it was when `before = snapshot(model)` was taken."""
    after = snapshot(model)
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    for part in ("parameters", "gradients", "config", "attributes"):
        assert before[part] == after[part], part


@pytest.fixture
def unchanged():
    """`with unchanged(model), pytest.raises(...)`: the model must be the same after the block as before it."""

    @contextmanager
    def check(model):
        before = snapshot(model)
        yield
        assert_same(model, before)

    return check
