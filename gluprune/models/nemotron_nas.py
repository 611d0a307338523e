"""Nemotron-NAS (DeciLM): the format of configs in which every layer of a Llama has its own width.

Weights keep their names and shapes. `block_configs` holds an entry for each layer, whose width is written in one of two
ways: `intermediate_size`, which vLLM reads, or `ffn_mult`, which vLLM, SGLang, TensorRT-LLM and llama.cpp's converter
read, and which expresses multiples of 256.

Sources: vllm/model_executor/models/nemotron_nas.py, sglang/srt/models/nemotron_nas.py,
tensorrt_llm/_torch/models/modeling_nemotron_nas.py, and `DeciModel` of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gluprune.models.widths import layer_widths, with_widths

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL_TYPE, ARCHITECTURE = "nemotron-nas", "DeciLMForCausalLM"
# The classes that the format expresses: its readers build the layers of Llama, which are RMSNorm, rotary embeddings in
# every layer, attention, and a SiLU GLU.
FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_OBSTACLES = {
    "qwen2": "its query, key and value projections have biases",
    "qwen3": "its attention normalises queries and keys",
    "ministral3": "its attention scales queries by their position",
    "smollm3": "some of its layers have no rotary embedding",
    "olmo2": "its norms follow attention and MLP",
    "granite": "it multiplies embeddings, attention, residuals and logits by constants",
    "gemma": "it scales its embeddings, and its MLP uses GELU",
    "gemma2": "it has norms after attention and MLP, and its MLP uses GELU",
    "gemma3_text": "it has norms after attention and MLP, and its MLP uses GELU",
    "phi3": "its projections are packed",
    "glm": "its projections are packed",
    "glm4": "its projections are packed, and it has norms after attention and MLP",
}
# Readers take these from the config, and each has defaults of its own.
_SPELLED_OUT = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
)
_ORIGIN = "gluprune_model_type"
_STEP = 256


def obstacle(model_type: str) -> str:
    """Return why the format does not hold models of a type; empty if it holds them."""
    if model_type in FAMILIES:
        return ""
    return _OBSTACLES.get(model_type, "it is not a plain Llama")


def config_obstacle(config: PreTrainedConfig) -> str:
    """Return why the format does not hold the model of a config; empty if it holds it."""
    if config.get_text_config() is not config:
        return "it has other parts than text"
    if found := obstacle(config.model_type):
        return found
    architectures, expected = list(config.architectures or ()), FAMILIES[config.model_type]
    rope = config.rope_parameters
    reasons = {
        f"its class is {', '.join(architectures)}, not {expected}": architectures not in ([], [expected]),
        "it has code of its own (auto_map)": getattr(config, "auto_map", None),
        "it is quantized": getattr(config, "quantization_config", None),
        "its attention uses a sliding window": getattr(config, "sliding_window", None) is not None,
        f"its MLP uses {config.hidden_act} instead of silu": config.hidden_act != "silu",
        "its projections have biases, which readers other than vLLM drop": getattr(config, "attention_bias", False)
        or getattr(config, "mlp_bias", False),
        "it rotates only a part of each head": rope.get("partial_rotary_factor", 1) != 1,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def fits_ffn_mult(widths: Sequence[int]) -> bool:
    """Whether `ffn_mult` expresses these widths, so that readers other than vLLM take them."""
    return all(width % _STEP == 0 for width in widths)


def ffn_mult(width: int, hidden_size: int) -> float:
    """Return the `ffn_mult` that readers turn into a width: `int(2 * ffn_mult * hidden_size / 3)`, rounded up to 256.

    It lies in the middle of the interval that gives this width, so that no rounding leaves it.

    Args:
        width: A multiple of 256.
        hidden_size: H.
    """
    return 3 * (width - _STEP / 2) / (2 * hidden_size)


def to_nemotron_nas(raw: dict, config: PreTrainedConfig) -> dict:
    """Return the entries of a config in this format.

    Args:
        raw: The entries of a config for which `config_obstacle` is empty.
        config: The config that transformers reads from them.
    """
    widths, rope = layer_widths(config), dict(config.rope_parameters)
    attention = {
        "n_heads_in_group": config.num_attention_heads // config.num_key_value_heads,
        "no_op": False,
        "replace_with_linear": False,
    }
    is_coarse = fits_ffn_mult(widths)
    blocks = []
    for width in widths:
        size = {"ffn_mult": ffn_mult(width, config.hidden_size)} if is_coarse else {"intermediate_size": width}
        blocks.append({"attention": dict(attention), "ffn": {**size, "no_op": False, "replace_with_linear": False}})
    # Readers, and transformers before 5, take these two instead of `rope_parameters`.
    theta = rope.pop("rope_theta")
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return {
        **{key: value for key, value in raw.items() if key not in ("per_layer_config", "rope_parameters")},
        **{key: getattr(config, key) for key in _SPELLED_OUT},
        "rope_theta": theta,
        "rope_scaling": scaling,
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": f"modeling_decilm.{ARCHITECTURE}",
        },
        "intermediate_size": max(widths),
        "block_configs": blocks,
        _ORIGIN: config.model_type,
    }


def block_widths(raw: dict) -> list[int]:
    """Return the width of every layer, from the entries of a config in this format."""
    from gluprune.models.decilm.configuration_decilm import ffn_width

    return [ffn_width(block["ffn"], raw["hidden_size"]) for block in raw["block_configs"]]


def from_nemotron_nas(raw: dict) -> dict:
    """Return the entries of the config that `to_nemotron_nas` converted.

    Args:
        raw: The entries that it returned.

    Raises:
        ValueError: They are the entries of another format, or of another program.
        KeyError, TypeError: They were changed.
    """
    if raw.get("model_type") != MODEL_TYPE or raw.get(_ORIGIN) not in FAMILIES:
        raise ValueError(
            f"only an export in the format {MODEL_TYPE} can be written back, not {raw.get('model_type')!r}"
        )
    dropped = ("block_configs", "auto_map", "rope_theta", "rope_scaling", _ORIGIN)
    entries = {
        **{key: value for key, value in raw.items() if key not in dropped},
        "model_type": raw[_ORIGIN],
        "architectures": [FAMILIES[raw[_ORIGIN]]],
        "rope_parameters": {"rope_theta": raw["rope_theta"], **(raw["rope_scaling"] or {"rope_type": "default"})},
    }
    return with_widths(entries, block_widths(raw))
