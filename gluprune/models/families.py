"""The table of supported models: where gate, up, down and the activation are, per `config.model_type`.

Every entry computes exactly `down(act(gate(x)) * up(x))`. A model that has something between the projections
(a norm, a multiplier, a clamp, a router) is rejected: pruning it would change what it computes.

A vision-language model is looked up by the type of its text part; its other parts are left unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """Names inside the MLP of one decoder layer.

    Attributes:
        mlp_class: Name of the transformers class whose forward is known to be a plain GLU.
        gate: Attribute name of the gate projection.
        up: Attribute name of the up projection. Equal to `gate` for a packed projection `[2 * I, H]`, whose first half
            is the gate and whose second half is up.
        down: Attribute name of the down projection.
        activation: Attribute name of the activation module.
        output_norm: Attribute name, in the decoder layer, of the norm between the down projection and the residual
            stream. Empty: there is none.
        rounding: How the family's RMSNorm rounds; see `csrc_triton.norm`.
    """

    mlp_class: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    output_norm: str = ""
    rounding: str = "scaled"

    @property
    def norm_class(self) -> str:
        """Name of the transformers class of the family's RMSNorm."""
        return self.mlp_class.removesuffix("MLP") + "RMSNorm"

    @property
    def packed(self) -> bool:
        """Whether gate and up are one projection."""
        return self.gate == self.up


def _packed(mlp_class: str, **others) -> Family:
    return Family(mlp_class, gate="gate_up_proj", up="gate_up_proj", activation="activation_fn", **others)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaMLP"),
    "mistral": Family("MistralMLP"),
    "qwen2": Family("Qwen2MLP"),
    "qwen3": Family("Qwen3MLP"),
    "ministral3": Family("Ministral3MLP"),
    "smollm3": Family("SmolLM3MLP"),
    "olmo2": Family("Olmo2MLP", output_norm="post_feedforward_layernorm", rounding="product"),
    "granite": Family("GraniteMLP"),
    "gemma": Family("GemmaMLP", rounding="offset"),
    "gemma2": Family("Gemma2MLP", output_norm="post_feedforward_layernorm", rounding="offset"),
    "gemma3_text": Family("Gemma3MLP", output_norm="post_feedforward_layernorm", rounding="offset"),
    "phi3": _packed("Phi3MLP"),
    "glm": _packed("GlmMLP"),
    "glm4": _packed("Glm4MLP", output_norm="post_mlp_layernorm"),
}

# Text parts that occur only in vision-language models; those of other models have one of the types above.
TEXT_PARTS: dict[str, Family] = {
    "mllama_text_model": Family("MllamaTextMLP"),
    "qwen2_vl_text": Family("Qwen2MLP"),
    "qwen2_5_vl_text": Family("Qwen2MLP"),
    "qwen3_vl_text": Family("Qwen3VLTextMLP"),
}

# Why a model that looks similar is not in the table, by config.model_type.
REFUSED: dict[str, str] = {
    "bitnet": "BitNet has a norm between the GLU and down_proj, over the neurons that pruning would remove",
    "falcon_h1": "Falcon-H1 multiplies the gate and the output by constants",
    "gemma3n": "Gemma 3n sparsifies the gate by a quantile over all neurons",
    "gemma3n_text": "Gemma 3n sparsifies the gate by a quantile over all neurons",
    "gpt_oss": "its experts clamp the GLU and are routed",
    "mixtral": "its MLPs are routed experts",
    "qwen2_moe": "its MLPs are routed experts",
    "qwen3_moe": "its MLPs are routed experts",
    "olmoe": "its MLPs are routed experts",
    "deepseek_v2": "its MLPs are routed experts",
    "deepseek_v3": "its MLPs are routed experts",
    "llama4_text": "its MLPs are routed experts",
    "nemotron-nas": "`gluprune export --format hf` writes an export of gluprune back",
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the table entry for a transformers config. For a composite model, this is the entry of its text config.

    Raises:
        ValueError: See `family_of_type`.
    """
    return family_of_type(config.get_text_config().model_type)


def family_of_type(model_type: str) -> Family:
    """Return the table entry for a `model_type`.

    Raises:
        ValueError: The model type is not in the table. The message says why if the reason is known.
    """
    for table in (FAMILIES, TEXT_PARTS):
        if model_type in table:
            return table[model_type]
    reason = REFUSED.get(model_type)
    raise ValueError(
        f"model type {model_type[:60]!r} is not supported"
        + (f": {reason}" if reason else "")
        + f"; supported are {', '.join(FAMILIES)}"
    )
