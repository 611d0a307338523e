"""Random models of every supported family, and snapshots to check that a model is unchanged."""

import hashlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gluprune.runtime import operator

DEVICE = "cpu" if operator.INTERPRETED else "cuda"
VOCABULARY = 61


def make_tiny_model(model_type="llama", dtype=torch.float32, seed=None, **overrides):
    """A random model of a supported family: hidden size 32, 101 neurons, 3 layers, biases if the family has them."""
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
    # transformers initialises biases to zero, which would hide mistakes.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def tiny_model(family="llama", width=77, dtype=torch.float32, seed=0, device="cpu", **config):
    """A model to patch: two layers, fast in the interpreter, sizes with partial tiles, logits of order one."""
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=width,
        num_hidden_layers=2,
        head_dim=12,
        max_position_embeddings=64,
        eos_token_id=None,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return make_tiny_model(family, dtype, seed, **{**settings, **config}).to(device)


def token_ids(batch=2, length=7, seed=0, device="cpu"):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def mlps(model):
    return [layer.mlp for layer in model.get_decoder().layers]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def gradients(model, ids):
    """Loss gradients of every parameter that has one, by name."""
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def snapshot(model):
    """Everything that patching and pruning can change: attributes of modules; identity, layout and bits of weights."""
    state = {"config": model.config.to_dict()} if hasattr(model, "config") else {}
    for name, module in model.named_modules():
        attributes = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers")
        }
        state[f"module {name}"] = type(module), attributes
    for name, weight in model.named_parameters(remove_duplicate=False):
        layout = weight.dtype, weight.device, weight.shape, weight.stride(), weight.storage_offset()
        storage = weight.untyped_storage().nbytes()
        state[name] = id(weight), id(weight.grad), layout, storage, weight.requires_grad, _digest(weight)
    state["names"] = tuple(model.state_dict())
    return state


def _digest(weight):
    if weight.is_meta:
        return None
    return hashlib.blake2b(weight.detach().cpu().contiguous().view(torch.uint8).numpy()).digest()


def assert_unchanged(model, before):
    """Assert that the model is exactly as it was at `before = snapshot(model)`."""
    after = snapshot(model)
    assert before.keys() == after.keys()
    for part, value in before.items():
        assert value == after[part], part
