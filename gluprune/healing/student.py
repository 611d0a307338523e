"""The student and the teacher: what of the student is trained, and a forward that returns the loss."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gluprune.healing.loss import divergence, head_logits, hidden_error
from gluprune.models.glu import decoder_layers, model_glus

TRAINED = ("all", "mlp", "lora")
_RANK, _ALPHA = 32, 64


def check_trained(train: str) -> None:
    """Check the name of what is to be trained.

    Raises:
        ValueError: It is not one of `TRAINED`.
        ImportError: "lora", and peft is not installed.
    """
    if train not in TRAINED:
        raise ValueError(f"unknown train {train!r}; allowed: {', '.join(TRAINED)}")
    if train == "lora" and importlib.util.find_spec("peft") is None:
        raise ImportError("train='lora' needs peft, which is not installed: pip install 'gluprune[lora]'")


def decoded(model: PreTrainedModel, ids: torch.Tensor, hidden_states: bool) -> Any:
    """Run a model without its head on token ids `[B, S]`; if wanted, its output has the hidden states of all layers."""
    decoder: Any = model.get_decoder()
    return decoder(input_ids=ids, use_cache=False, output_hidden_states=hidden_states)


@dataclass(frozen=True)
class Answer:
    """What a teacher computed on a batch.

    Attributes:
        model: The teacher.
        hidden: `[B * S, H]`, from its decoder.
        hidden_states: After every layer, `[B, S, H]`; empty if they were not asked for.
    """

    model: PreTrainedModel
    hidden: torch.Tensor
    hidden_states: Sequence[torch.Tensor]

    @torch.no_grad()
    def logits(self, rows: slice) -> torch.Tensor:
        """Return the float32 logits `[tokens, V]` of some tokens."""
        head: Any = self.model.get_output_embeddings()
        return head_logits(self.model, self.hidden[rows], list(head.parameters()))


@torch.no_grad()
def answer(teacher: PreTrainedModel, ids: torch.Tensor, hidden_states: bool) -> Answer:
    """Run a teacher in its dtype.

    Args:
        teacher: A causal LM.
        ids: Token ids `[B, S]`.
        hidden_states: Whether those of all layers are needed.
    """
    output = decoded(teacher, ids, hidden_states)
    return Answer(teacher, output.last_hidden_state.flatten(0, 1), _after_layers(output) if hidden_states else ())


def as_student(model: PreTrainedModel, train: str, hidden_weight: float = 0.0) -> Any:
    """Give a model a forward `(input_ids, answer)` that returns the loss, and choose what of it is trained.

    Args:
        model: A causal LM with weights in float32, patched or not; it is changed.
        train: "all": the decoder and the head; "mlp": the MLPs and all norms; "lora": low-rank updates of the linear
            layers of the decoder layers.
        hidden_weight: Factor of the error of the hidden states. 0: it is not computed.

    Returns:
        The model; with "lora", in a `PeftModel`.
    """
    stock = type(model)

    def forward(self, input_ids: torch.Tensor, answer: Answer) -> dict[str, torch.Tensor]:
        output = decoded(self, input_ids, hidden_weight > 0)
        loss = divergence(self, output.last_hidden_state, answer.logits)
        if hidden_weight > 0:
            loss = loss + hidden_weight * hidden_error(_after_layers(output), answer.hidden_states)
        return {"loss": loss}

    model.__class__ = type(stock.__name__, (stock,), {"forward": forward, "__module__": stock.__module__})
    trained = {id(parameter) for parameter in _trained(model, train)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return with_adapters(model) if train == "lora" else model


def with_weights(model: PreTrainedModel, state: dict[str, torch.Tensor], train: str) -> PreTrainedModel:
    """Return a model with the weights of a trained student.

    Args:
        model: The student before training, in float32; it is changed.
        state: The state dict of the trained student.
        train: What was trained.
    """
    wrapped = with_adapters(model) if train == "lora" else model
    wrapped.load_state_dict(state)
    return merged(wrapped) if train == "lora" else model


def with_adapters(model: PreTrainedModel) -> Any:
    """Return a model in a `PeftModel` with new adapters, whose updates are zero."""
    from peft import LoraConfig, get_peft_model

    linear = {id(m) for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)}
    names = [name for name, module in model.named_modules() if id(module) in linear]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers renamed
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules=names))


def merged(model: Any) -> PreTrainedModel:
    """Return the model inside a `PeftModel`, with its updates added to the weights.

    Neurons whose column of the down projection was zero are padding, whose column stays zero.
    """
    columns = [glu.down.weight for glu in model_glus(model.get_base_model())]
    padding = [(weight == 0).all(0) for weight in columns]
    found = model.merge_and_unload()
    with torch.no_grad():
        for glu, mask in zip(model_glus(found), padding, strict=True):
            glu.down.weight[:, mask] = 0
    return found


def _trained(model: PreTrainedModel, train: str) -> list[nn.Parameter]:
    decoder: Any = model.get_decoder()
    if train == "mlp":
        norms = [p for name, p in decoder.named_parameters() if p.dim() == 1 and name.endswith("weight")]
        return [*norms, *(p for glu in model_glus(model) for p in glu.mlp.parameters())]
    if train == "lora":
        return []
    head: Any = model.get_output_embeddings()
    return [*decoder.parameters(), *head.parameters()]


def _after_layers(output: Any) -> Sequence[torch.Tensor]:
    return output.hidden_states[1:]
