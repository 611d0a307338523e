"""MLPs with weights of 8 bits: `nn.Linear` modules become `Fp8Linear` modules, and back.

The bits are held as uint8, which `module.to(dtype)` leaves alone. It converts the scales, exactly; so they have the
dtype that the layer computes in, and that the rounded weights get in a state dict (`gluprune.runtime.rounding`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gluprune.models.families import Family
from gluprune.runtime import sharding
from gluprune.runtime.operator import KERNEL_DTYPES, layout
from gluprune.runtime.rounding import LARGEST, NO_GRADIENT, dequantize, quantize


class _Refused(torch.autograd.Function):
    """The identity, with no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(NO_GRADIENT)


class Fp8Linear(nn.Module):
    """A linear layer with fp8 weights, in place of the `nn.Linear` that it is made of.

    Its state dict is that of the linear layer with the rounded weights. It takes no gradient and loads no state dict.

    Args:
        linear: The layer, whose bias goes on to be used.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bits, scale = quantize(linear.weight.detach())
        self.weight = nn.Parameter(bits, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self._trained = linear.weight.requires_grad
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the projection of `x` `[..., K]`, by way of the weight in the dtype of the scales."""
        y = F.linear(x, self.dequantized(), self.bias)
        return _Refused.apply(y) if y.requires_grad else y

    def dequantized(self) -> torch.Tensor:
        """Return the rounded weight `[N, K]` in the dtype of the layer, a new tensor."""
        return dequantize(self.weight, self.scale)

    def to_linear(self) -> nn.Linear:
        """Return an `nn.Linear` with the rounded weight and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantized(), requires_grad=self._trained)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dequantized()
        del destination[prefix + "scale"]

    def _load_from_state_dict(self, state_dict, prefix, *others):
        *_, errors = others
        errors.append(f"{prefix}weight is fp8, which no weights can be loaded into: unpatch the model first")


def is_rounded(mlp: nn.Module) -> bool:
    """Return whether an MLP has fp8 weights."""
    return any(type(module) is Fp8Linear for module in mlp._modules.values())


def check(name: str, mlp: nn.Module, family: Family) -> None:
    """Check that the projections of an MLP can be rounded. Reads every weight.

    Raises:
        ValueError: The GPU cannot convert fp8; a projection is not a plain linear layer, or its weight is sharded, on
            the meta device, of another dtype, or not finite.
    """
    for projection in dict.fromkeys((family.gate, family.up, family.down)):
        if reason := _obstacle(mlp._modules[projection]):
            label = f"{name}.{projection}".removeprefix(".")
            raise ValueError(f"{label} cannot have fp8 weights: {reason}")


def _obstacle(layer: Any) -> str | None:
    """Return why the weights of a projection cannot be rounded, or None."""
    if type(layer) is not nn.Linear:
        return f"it is {type(layer).__module__.partition('.')[0]}'s {type(layer).__name__}"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if "forward" in vars(layer) or any(getattr(layer, hook) for hook in hooks):
        return "it has a hook"
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.device.type == "meta" or sharding.is_under_fsdp(layer):
        return "its weight is sharded, offloaded or not loaded"
    if weight.dtype not in KERNEL_DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}; allowed: bfloat16, float16, float32"
    if old := too_old(weight.device):
        return old
    largest = weight.detach().abs().max().item() if weight.numel() else 0.0
    return None if largest <= LARGEST else f"the largest magnitude of its weight is {largest:g}; allowed: {LARGEST:g}"


def too_old(device: torch.device) -> str | None:
    """Return why kernels on a device cannot read fp8 weights, or None. A CPU has no such limit."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability[0] * 10 + capability[1] >= layout.FP8_SM:
        return None
    return f"fp8 needs a GPU of compute capability {layout.FP8_SM / 10}, {device} has {capability[0]}.{capability[1]}"


@torch.inference_mode(False)  # inference tensors could not be trained afterwards
@torch.no_grad()
def round_weights(mlp: nn.Module) -> None:
    """Give an MLP that passed `check` fp8 weights."""
    for name, module in mlp._modules.items():
        if type(module) is nn.Linear:
            mlp._modules[name] = Fp8Linear(module)


@torch.inference_mode(False)
@torch.no_grad()
def restore_linears(mlp: nn.Module) -> None:
    """Give an MLP its `nn.Linear` modules back, with the rounded weights."""
    for name, module in mlp._modules.items():
        if type(module) is Fp8Linear:
            mlp._modules[name] = module.to_linear()
