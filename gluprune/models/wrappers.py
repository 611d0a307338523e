"""Models inside the wrappers of other libraries, and weights that are somewhere else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Wrappers that keep views of the parameters, or slices of them: what they hold must not change its shape.
_DISTRIBUTED = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside a compiled model or a PEFT model with merged adapters.

    Args:
        model: A model, wrapped or not.

    Raises:
        ValueError: Adapters that are not merged, in a PEFT model or not, or a wrapper for several devices.
    """
    if hasattr(model, "_orig_mod"):  # of torch.compile
        model = model._orig_mod
    name = type(model).__name__
    if name in _DISTRIBUTED:
        raise ValueError(f"the model is wrapped in {name}: give the model inside it, model.module, before wrapping it")
    is_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    layers = adapter_layers(model)
    if (is_peft and not layers) or not all(getattr(layer, "merged", False) for layer in layers):
        how = "model = model.merge_and_unload()"
        if not is_peft:
            how = (
                "merge_and_unload() of the PEFT model around it; after add_adapter, save the adapter, load it with"
                " peft.PeftModel.from_pretrained(base_model, adapter), and call merge_and_unload() of that"
            )
        raise ValueError(f"{name} has adapters that are not merged: merge them first, with {how}")
    return model.get_base_model() if is_peft else model


def adapter_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a model that PEFT has put around others."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [module for module in modules if hasattr(module, "base_layer")]


def check_weight(label: str, weight: torch.Tensor) -> None:
    """Check that a weight is on its device and complete.

    Raises:
        ValueError: It is on the meta device, as are offloaded weights, or a placeholder of DeepSpeed's ZeRO-3.
    """
    if weight.device.type == "meta":
        raise ValueError(f"{label} is on the meta device: load the weights first, without offloading")
    if not weight.numel():
        raise ValueError(
            f"{label} has shape {list(weight.shape)}: gather the weights first, for example with"
            " deepspeed.zero.GatheredParameters"
        )


def check_weights(model: nn.Module) -> None:
    """Check all weights of a model; see `check_weight`."""
    for name, parameter in model.named_parameters():
        check_weight(name, parameter)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by `module.compile()` or `torch.compile(module)`."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
