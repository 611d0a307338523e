"""The one table of supported models: where gate, up, down and the activation are, per `config.model_type`.

Every entry computes `down(act(gate(x)) * up(x))` and nothing else. Models that put something between the projections
(a norm, a multiplier, a clamp, a router) are refused by name, because narrowing them would change what they compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """Names inside one decoder layer's MLP.

    mlp_class: name of the transformers class whose forward is known to be a plain GLU.
    gate, up: attribute names of the gate and up projections; equal for a packed projection `[2 * I, H]`, whose first
        half is the gate and whose second half is up.
    activation: attribute name of the activation module.
    normalized: whether a norm comes between the down projection and the residual stream.
    """

    mlp_class: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    normalized: bool = False

    @property
    def packed(self) -> bool:
        return self.gate == self.up


def _packed(mlp_class: str, **others) -> Family:
    return Family(mlp_class, gate="gate_up_proj", up="gate_up_proj", activation="activation_fn", **others)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaMLP"),
    "mistral": Family("MistralMLP"),
    "qwen2": Family("Qwen2MLP"),
    "qwen3": Family("Qwen3MLP"),
    "smollm3": Family("SmolLM3MLP"),
    "olmo2": Family("Olmo2MLP", normalized=True),
    "granite": Family("GraniteMLP"),
    "gemma": Family("GemmaMLP"),
    "gemma2": Family("Gemma2MLP", normalized=True),
    "gemma3_text": Family("Gemma3MLP", normalized=True),
    "phi3": _packed("Phi3MLP"),
    "glm": _packed("GlmMLP"),
    "glm4": _packed("Glm4MLP", normalized=True),
}

# Why a model that looks similar is not in the table. The key is config.model_type.
REFUSED: dict[str, str] = {
    "bitnet": "BitNet normalises between the GLU and down_proj over the neurons that pruning would remove",
    "falcon_h1": "Falcon-H1 multiplies the gate and the output by constants of its own",
    "gemma3n": "Gemma 3n sparsifies the gate by a quantile over all neurons",
    "gemma3n_text": "Gemma 3n sparsifies the gate by a quantile over all neurons",
    "gpt_oss": "its experts clamp the GLU and are chosen by a router",
    "mixtral": "its MLPs are experts behind a router",
    "qwen2_moe": "its MLPs are experts behind a router",
    "qwen3_moe": "its MLPs are experts behind a router",
    "olmoe": "its MLPs are experts behind a router",
    "deepseek_v2": "its MLPs are experts behind a router",
    "deepseek_v3": "its MLPs are experts behind a router",
    "llama4_text": "its MLPs are experts behind a router",
}


def family_of(config) -> Family:
    """The table entry for a transformers config; of a composite model the text config counts.

    Raises:
        ValueError: see `family_of_type`.
    """
    return family_of_type(config.get_text_config().model_type)


def family_of_type(model_type: str) -> Family:
    """The table entry for a `model_type`.

    Raises:
        ValueError: the model type is not in the table; the message says why where the reason is known.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = REFUSED.get(model_type)
    raise ValueError(
        f"model type {model_type!r} is not supported"
        + (f": {reason}" if reason else "")
        + f"; supported are {', '.join(FAMILIES)}"
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a Hugging Face causal LM (or of its bare decoder)."""
    decoder = getattr(model, model.base_model_prefix, model)
    return decoder.layers


@dataclass(frozen=True)
class GLU:
    """One layer's MLP seen through its family. Weights are read when asked for, so the view never goes stale."""

    family: Family
    mlp: nn.Module

    @property
    def gate(self) -> nn.Module:
        return getattr(self.mlp, self.family.gate)

    @property
    def up(self) -> nn.Module:
        return getattr(self.mlp, self.family.up)

    @property
    def down(self) -> nn.Module:
        return getattr(self.mlp, self.family.down)

    @property
    def projections(self) -> dict[str, nn.Module]:
        """The distinct projection modules by attribute name."""
        family = self.family
        return {name: getattr(self.mlp, name) for name in dict.fromkeys((family.gate, family.up, family.down))}

    @property
    def activation(self) -> nn.Module:
        return getattr(self.mlp, self.family.activation)

    @property
    def intermediate_size(self) -> int:
        return self.down.weight.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.down.weight.shape[0]

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate `[I, H]`, up `[I, H]` and down `[H, I]`, detached views of the parameters."""
        down = self.down.weight.detach()
        if self.family.packed:
            gate, up = self.gate.weight.detach().chunk(2, dim=0)
        else:
            gate, up = self.gate.weight.detach(), self.up.weight.detach()
        return gate, up, down


def original_class(mlp: nn.Module) -> type:
    """The transformers class of an MLP, whether or not it is patched."""
    return getattr(type(mlp), "original_class", type(mlp))


def model_glus(model: nn.Module) -> list[GLU]:
    """The GLU of every decoder layer, in order.

    Raises:
        ValueError: the model is of an unsupported type, or an MLP is not the class that the table knows.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ValueError(f"expected a Hugging Face causal LM, got {type(model).__name__}")
    family = family_of(model.config)
    glus = []
    for index, layer in enumerate(decoder_layers(model)):
        mlp = getattr(layer, "mlp", None)
        found = original_class(mlp).__name__
        if found != family.mlp_class:
            raise ValueError(f"layer {index} holds {found} where {family.mlp_class} was expected")
        glus.append(GLU(family, mlp))
    return glus
