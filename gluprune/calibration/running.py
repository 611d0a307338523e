"""Running a model on calibration text: in eval mode, without the head, in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gluprune.models.wrappers import is_compiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_ran(index: int, has_run: bool) -> None:
    """Check that a layer ran on text; those for images do not.

    Raises:
        ValueError: It did not run.
    """
    if not has_run:
        raise ValueError(f"layer {index} does not run on text: it cannot be calibrated, prune other layers")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode; afterwards, every module is in its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parents come before their children, whose former mode is set after theirs
            if module.training != training:
                module.train(training)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode and its own code, also where it is compiled: compiled code ignores hooks added later."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if any(map(is_compiled, model.modules())):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def is_half_on_cpu(parameter: torch.Tensor) -> bool:
    """Whether computing in float32 is better for a tensor: most CPUs have no bf16 or fp16 arithmetic."""
    return parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Run decoder layers in half precision on a CPU in float32.

    Each gets a float32 copy of its weights, which exists only during its forward. Other layers run unchanged.
    """
    originals: list[tuple[nn.Parameter, torch.Tensor]] = []

    def upcast(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        for parameter in layer.parameters():
            if is_half_on_cpu(parameter):
                originals.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
        if originals:
            args = args[0].float(), *args[1:]  # the hidden states
        return args, kwargs

    def restore(*_) -> None:
        while originals:
            parameter, data = originals.pop()
            parameter.data = data

    with ExitStack() as stack:
        stack.callback(restore)
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(upcast, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(restore).remove)
        yield


def run_decoder(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Run a batch without the language-model head, whose logits would be the largest tensor of all.

    Args:
        model: A causal LM.
        ids: Token ids `[B, S]`.
        mask: bool `[B, S]`, True is a token; None if all are.
    """
    decoder: Any = model.get_decoder()
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    attention_mask = None if mask is None else mask.long().to(device)
    decoder(input_ids=ids.to(device), attention_mask=attention_mask, use_cache=False)
