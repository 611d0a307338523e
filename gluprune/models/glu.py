"""Access to the GLU MLPs of a loaded model, by means of the table of families."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gluprune.models.families import Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a Hugging Face causal LM, of the text part of a composite one or a bare decoder."""
    decoder: Any = model.get_decoder()
    return decoder.layers


def text_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return every config object of the text part: parts of a composite model have copies of their config."""
    text = model.config.get_text_config()
    found = {id(text): text}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            own = config.get_text_config()
            if type(own) is type(text):
                found[id(own)] = own
    return list(found.values())


@dataclass(frozen=True)
class GLU:
    """The MLP of one layer. Weights are read on access, so a GLU stays valid when they are replaced.

    Attributes:
        family: Where the projections are.
        mlp: The module that holds them.
    """

    family: Family
    mlp: nn.Module

    @property
    def gate(self) -> nn.Linear:
        """The gate projection `[I, H]`, or the packed one `[2 * I, H]`."""
        return getattr(self.mlp, self.family.gate)

    @property
    def up(self) -> nn.Linear:
        """The up projection `[I, H]`, or the packed one `[2 * I, H]`."""
        return getattr(self.mlp, self.family.up)

    @property
    def down(self) -> nn.Linear:
        """The down projection `[H, I]`."""
        return getattr(self.mlp, self.family.down)

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """The distinct projection modules by attribute name."""
        family = self.family
        return {name: getattr(self.mlp, name) for name in dict.fromkeys((family.gate, family.up, family.down))}

    @property
    def activation(self) -> nn.Module:
        """The activation module."""
        return getattr(self.mlp, self.family.activation)

    @property
    def intermediate_size(self) -> int:
        """The number of neurons I."""
        return self.down.weight.shape[1]

    @property
    def hidden_size(self) -> int:
        """The hidden size H."""
        return self.down.weight.shape[0]

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return gate `[I, H]`, up `[I, H]` and down `[H, I]`, detached views of the parameters."""
        down = self.down.weight.detach()
        if self.family.packed:
            gate, up = self.gate.weight.detach().chunk(2, dim=0)
        else:
            gate, up = self.gate.weight.detach(), self.up.weight.detach()
        return gate, up, down


def original_class(mlp: nn.Module) -> type:
    """Return the transformers class of an MLP, patched or not."""
    return getattr(type(mlp), "original_class", type(mlp))


def model_glus(model: PreTrainedModel) -> list[GLU]:
    """Return the GLU of every decoder layer, in order.

    Raises:
        ValueError: The model type is not supported, or an MLP is not of the class in the table.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        hint = ": load it first, with gluprune.load" if isinstance(model, (str, Path)) else ""
        raise ValueError(f"expected a Hugging Face causal LM, got {type(model).__name__}{hint}")
    family = family_of(model.config)
    glus = []
    for index, layer in enumerate(decoder_layers(model)):
        mlp: Any = getattr(layer, "mlp", None)
        found = original_class(mlp).__name__
        if found != family.mlp_class:
            raise ValueError(f"layer {index} holds {found} where {family.mlp_class} was expected")
        glus.append(GLU(family, mlp))
    return glus


def check_head(model: PreTrainedModel, purpose: str) -> None:
    """Check that a model predicts tokens; reward models and bare decoders do not.

    Raises:
        ValueError: It has no language-model head; the message begins with `purpose`.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(f"{purpose} needs a model with a language-model head, but {type(model).__name__} has none")


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def resize(glu: GLU, width: int) -> None:
    """Replace the projections of a GLU by uninitialised ones with `width` neurons, while a model is built."""
    rows = 2 * width if glu.family.packed else width
    for name, old in glu.projections.items():
        inputs, outputs = (width, old.out_features) if name == glu.family.down else (old.in_features, rows)
        new = nn.Linear(inputs, outputs, bias=old.bias is not None, device="meta", dtype=old.weight.dtype)
        setattr(glu.mlp, name, new.to_empty(device=old.weight.device))
    if hasattr(glu.mlp, "intermediate_size"):
        setattr(glu.mlp, "intermediate_size", width)  # noqa: B010 (not a parameter)
