"""Random models of every supported family, small enough for the interpreter, and how a patched one is compared."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gluprune import ops
from gluprune.families import FAMILIES

DEVICE = "cpu" if ops.INTERPRETED else "cuda"
VOCABULARY = 61


def tiny_model(family="llama", width=77, dtype=torch.float32, seed=0, device="cpu", **config):
    """An eval-mode causal LM with H = 48 and two layers, whose MLPs have `width` neurons."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.2,
        dtype=dtype,
    )
    settings.update(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), attn_implementation="eager")
    return model.to(device).eval()


def tiny_width(family):
    """A width that the family can be fused at: packed projections need a multiple of 128."""
    return 128 if FAMILIES[family].packed else 77


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
    """Everything that unpatching must bring back: attributes of every module, and identity, layout and bits of every weight."""
    state = {}
    for name, module in model.named_modules():
        attributes = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers")
        }
        state[name] = type(module), attributes
    for name, weight in model.named_parameters(remove_duplicate=False):
        layout = weight.dtype, weight.device, weight.shape, weight.stride(), weight.storage_offset()
        bits = weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if not weight.is_meta else b""
        state[name] = id(weight), layout, weight.untyped_storage().nbytes(), weight.requires_grad, bits
    state[""] = state[""], tuple(model.state_dict())
    return state
