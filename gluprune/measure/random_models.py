"""Random weights in the shapes of real models, for measuring without a checkpoint.

Time and energy do not depend on the values of the weights.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_COMMON = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "architectures": ["LlamaForCausalLM"],
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-3.2-1b": LlamaConfig(
        **_COMMON,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters={**_ROPE, "factor": 32.0},
    ),
    "llama-3.2-3b": LlamaConfig(
        **_COMMON,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
        tie_word_embeddings=True,
        rope_parameters={**_ROPE, "factor": 32.0},
    ),
    "llama-3.1-8b": LlamaConfig(
        **_COMMON,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        rope_parameters={**_ROPE, "factor": 8.0},
    ),
}


def random_model(name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """Return a causal LM in eval mode on the CPU, in the shapes of a real one.

    Matrices are filled from one pool of 2**24 normal numbers (standard deviation 0.02), each from a different offset,
    which takes seconds instead of minutes; vectors (of norms) are ones.

    Args:
        name: A key of `CONFIGS`.
        dtype: Dtype of the weights.
        seed: Seed of the random numbers.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r} for random weights; allowed: {', '.join(CONFIGS)}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    model.to_empty(device="cpu").tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are computed, not stored
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(1 << 24, generator=generator) * 0.02).to(dtype)
    for parameter in model.parameters():
        flat, start = parameter.data.view(-1), int(torch.randint(len(pool), (1,), generator=generator))
        if parameter.dim() == 1:
            flat.fill_(1)
            continue
        while len(flat):
            piece = pool[start : start + len(flat)]
            flat[: len(piece)] = piece
            flat, start = flat[len(piece) :], 0
    return model.eval()
