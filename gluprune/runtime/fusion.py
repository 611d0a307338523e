"""Whether an MLP can run fused, and if not, why: the only module that answers this question.

An MLP runs fused only if the operator computes exactly what the MLP's modules compute. Three things decide:

- its class and activation, which `patch` checks (`class_obstacle`),
- its modules and weights, which may change at any time (`module_obstacle`),
- the call: input, autocast, tracing, transforms (`is_fusible`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn
from torch.autograd import forward_ad
from transformers.activations import ACT2FN

from gluprune.models.families import FAMILIES, TEXT_PARTS, Family
from gluprune.runtime import aligned, fp8, operator, sharding
from gluprune.runtime.gradients import Operands

# An MLP whose class `patch` has set: a module with the class attributes `family` and `backend`.
PatchedMLP: TypeAlias = Any

ROUNDING_OF_NORM = {family.norm_class: family.rounding for family in FAMILIES.values()}
FAMILY_OF_CLASS = {family.mlp_class: family for family in (*FAMILIES.values(), *TEXT_PARTS.values())}
ACTIVATION_OF_CLASS = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["swish"]): "silu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
}
_PLAIN = (torch.Tensor, nn.Parameter)
_LINEAR_FORWARD = nn.Linear.forward


@dataclass(frozen=True)
class MLPStatus:
    """Whether one GLU MLP of a model runs fused.

    Attributes:
        name: Path of the module in the model.
        fused: Whether its forward runs the fused operator.
        reason: Why not; empty if fused.
    """

    name: str
    fused: bool
    reason: str


def fusion_status(model: nn.Module) -> list[MLPStatus]:
    """Return, for every GLU MLP of a supported family in order, whether it runs fused now, and why not.

    Args:
        model: Any module; MLPs are found at any depth.

    Returns:
        One `MLPStatus` per MLP.

    Example:
        >>> import gluprune, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
        >>> model = gluprune.patch_llama(LlamaForCausalLM(config))
        >>> len(gluprune.fusion_status(model))
        2
    """
    return [_status(name, _current_obstacle(mlp)) for name, mlp in find_glus(model)]


def fusion_prospect(model: nn.Module) -> list[MLPStatus]:
    """Return, for every GLU MLP of a supported family in order, whether `patch` would fuse it on a GPU, and why not.

    Only classes are checked, so the model may be on the meta device.
    """
    return [_status(name, class_obstacle(mlp)) for name, mlp in find_glus(model)]


def summary(reasons: Sequence[str | None]) -> str:
    """Return the reasons with their counts in one line."""
    return "; ".join(f"{count} x {reason}" for reason, count in Counter(filter(None, reasons)).items())


def _status(name: str, reason: str | None) -> MLPStatus:
    return MLPStatus(name, fused=reason is None, reason=reason or "")


def find_glus(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every MLP whose class is in the table of families, patched or not."""
    return ((name, module) for name, module in model.named_modules() if glu_class(module) is not None)


def glu_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of the table that a module is an instance of (also if patched or subclassed), else None."""
    for owner in type(module).__mro__:
        if owner.__name__ in FAMILY_OF_CLASS and owner.__module__.startswith("transformers.models."):
            return owner
    return None


def family_of(mlp: nn.Module) -> Family:
    """Return the entry of the table of families for an MLP that `find_glus` finds."""
    owner = glu_class(mlp)
    assert owner is not None
    return FAMILY_OF_CLASS[owner.__name__]


def has_fused_forward(mlp: nn.Module) -> bool:
    """Whether the class of an MLP is the one that `patch` set, or a subclass of it."""
    return hasattr(type(mlp), "original_class")


def is_patched(mlp: nn.Module) -> bool:
    """Whether the class of an MLP is the one that `patch` set, and not a subclass."""
    return "original_class" in vars(type(mlp))


def _current_obstacle(mlp: PatchedMLP) -> str | None:
    """Return why an MLP does not run fused now, or None."""
    if not has_fused_forward(mlp):
        return class_obstacle(mlp) or "not patched"
    if not runs_forward_of(mlp, type(mlp)):
        return "its forward was replaced"
    if obstacle := module_obstacle(mlp):
        between = sharding.is_under_fsdp(mlp) and obstacle.endswith("DTensor")
        return "FSDP has its weights; examined when they are gathered for a forward" if between else obstacle
    gate, up, down, *_ = operands(mlp)
    if not operator.uses_kernels(mlp.backend, down.device):
        return f"backend {mlp.backend!r} runs PyTorch's operators on {down.device.type}"
    unaligned = trains(mlp) and down.shape[1] % aligned.ALIGNMENT  # then the operator pads a copy of down
    if aligned.is_aligned(gate, up, None if unaligned else down) or sharding.is_under_fsdp(mlp):
        return None
    return "its weights are not in aligned storage: patch again"


def trains(mlp: PatchedMLP) -> bool:
    """Whether optimizers may work on the weights of a patched MLP."""
    return mlp.training and not fp8.is_rounded(mlp)


def class_obstacle(mlp: nn.Module) -> str | None:
    """Return why the class of an MLP must not be swapped, or None if it may."""
    owner = glu_class(mlp)
    if owner is None:
        return f"{type(mlp).__name__} is not a GLU MLP of a supported family"
    if obstacle := _forward_obstacle(mlp, owner):
        return obstacle
    activation = getattr(mlp, FAMILY_OF_CLASS[owner.__name__].activation)
    if type(activation) not in ACTIVATION_OF_CLASS:
        return _unsupported_activation(activation)
    return None


def _forward_obstacle(module: nn.Module, owner: type[nn.Module]) -> str | None:
    """Return why a module may run another forward than the one that the class `owner` of transformers defines."""
    if type(module) is not owner and not is_patched(module):
        return f"{type(module).__name__} is a subclass of {owner.__name__}"
    forward = owner.forward
    if forward.__module__ != owner.__module__ or forward.__qualname__ != f"{owner.__qualname__}.forward":
        return f"the forward of {owner.__name__} was replaced by {forward.__module__}.{forward.__qualname__}"
    return None if runs_forward_of(module, type(module)) else "its forward was replaced"


def module_obstacle(mlp: PatchedMLP) -> str | None:
    """Return why the modules of a patched MLP may compute something other than the fused operator, or None."""
    family = mlp.family
    activation = activation_of(mlp)
    if type(activation) not in ACTIVATION_OF_CLASS:
        return _unsupported_activation(activation)
    if _is_modified(activation):
        return f"{family.activation} has a hook"
    is_split = sharding.group_of(mlp) is not None
    for name in (family.gate, family.up, family.down):
        projection = mlp._modules[name]
        if type(projection) not in (nn.Linear, fp8.Fp8Linear):
            return f"{name} is {type(projection).__module__.partition('.')[0]}'s {type(projection).__name__}"
        if has_hooks(projection.__dict__) or not (is_split or runs_forward_of(projection, type(projection))):
            return f"{name} has a hook"
        weight = projection._parameters.get("weight")
        if weight is None:
            return f"{name}.weight is no parameter (sharded, or a replica of nn.DataParallel)"
        if type(weight) not in _PLAIN and not is_split:
            return f"{name}.weight is {type(weight).__name__}"
        if (
            operator.INTERPRETED
            and dtype_of(projection) == torch.bfloat16
            and mlp.backend == "triton"
            and not weight.is_cuda
        ):
            return "Triton's interpreter computes products of bfloat16 wrongly"
    return _operand_obstacle(operands(mlp))


def _operand_obstacle(tensors: Operands) -> str | None:
    gate, up, down, *others = tensors
    biases, scales = others[:3], others[3:]
    dtype, device = down.dtype, down.device
    if any(scale is not None for scale in scales):
        dtype = scales[-1].dtype if scales[-1] is not None else dtype
        if any(scale is None for scale in scales):
            return "only some of the weights are fp8"
        if too_old := fp8.too_old(device):
            return too_old
    if dtype not in operator.KERNEL_DTYPES:
        return f"the weights are {str(dtype).removeprefix('torch.')}"
    if device.type == "meta":
        return "the weights are on the meta device (offloaded, or not loaded)"
    for other in (gate, up, *others):
        expected = down.dtype if other is gate or other is up else dtype
        if other is not None and (type(other) not in _PLAIN or other.dtype != expected or other.device != device):
            return "the weights differ in dtype, device or kind"
    for bias, size in zip(biases, (*gate.shape[:1], *up.shape[:1], *down.shape[:1]), strict=False):
        if bias is not None and (bias.shape != (size,) or not bias.is_contiguous()):
            return "the biases' shapes do not fit together"
    if down.dim() != 2 or gate.shape != up.shape or gate.shape != down.shape[::-1]:
        return "the weights' shapes do not fit together"
    return None if gate.shape[0] else "it has no neurons"  # the last ranks of few neurons


def is_fusible(mlp: PatchedMLP, x: torch.Tensor) -> bool:
    """Whether the fused operator computes what the modules of a patched MLP compute for `x`, in this call."""
    if not operator.uses_kernels(mlp.backend, x.device) or torch.is_autocast_enabled(x.device.type):
        return False
    if torch.jit.is_tracing() or is_intercepted():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if type(x) not in _PLAIN or x.layout is not torch.strided or module_obstacle(mlp) is not None:
        return False
    projection = mlp._modules[mlp.family.down]
    down = projection._parameters["weight"]
    if x.dtype != dtype_of(projection) or x.device != down.device or x.shape[-1] != down.shape[0]:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    # The gradients of shards are summed by transformers' own code, which also gathers them under FSDP.
    if type(down) not in _PLAIN and (torch.is_grad_enabled() or sharding.is_under_fsdp(mlp)):
        return False
    return torch.compiler.is_compiling() or not x.is_neg()  # which cannot be traced


def is_intercepted() -> bool:
    """Whether something outside the MLP sees or changes what its modules compute, or differentiates it forwards."""
    # The flag, not `is_exporting()`, which is always true in what torch.compile compiles up to torch 2.11. An exported
    # program holds only PyTorch's operators, so it runs without this package.
    if torch.compiler._is_exporting_flag:  # pyright: ignore[reportPrivateImportUsage]
        return True
    if nn.modules.module._has_any_global_hook():
        return True
    if torch.compiler.is_compiling():  # which guards what it traces, and calls function modes for the operator
        return False
    if nn.Linear.forward is not _LINEAR_FORWARD:
        return True
    return forward_ad._current_level >= 0 or torch._C._len_torch_function_stack() > 0


def norm_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of a supported RMSNorm that a module is an instance of (also if patched), else None."""
    for owner in type(module).__mro__:
        if owner.__name__ in ROUNDING_OF_NORM and owner.__module__.startswith("transformers.models."):
            return owner
    return None


def may_swap_norm(norm: nn.Module) -> bool:
    """Whether a module is an RMSNorm of a supported family that runs the forward of its class."""
    owner = norm_class(norm)
    return owner is not None and _forward_obstacle(norm, owner) is None


def is_norm_fusible(norm: Any, x: torch.Tensor) -> bool:
    """Whether the fused norm computes what the eager code of a patched norm computes for `x`, without autograd."""
    weight = norm._parameters.get("weight")
    if type(weight) not in _PLAIN or type(x) not in _PLAIN or not operator.uses_kernels(norm.backend, x.device):
        return False
    if torch._C._is_tracing() or is_intercepted() or torch._C._are_functorch_transforms_active():
        return False
    if operator.INTERPRETED and x.dtype == torch.bfloat16 and not x.is_cuda:
        return False  # the interpreter truncates
    if x.dtype != weight.dtype or x.device != weight.device or x.dtype not in operator.KERNEL_DTYPES:
        return False
    if weight.dim() != 1 or x.shape[-1:] != weight.shape or weight.shape[0] > operator.layout.MOST_NORM_COLUMNS:
        return False
    if x.layout is not torch.strided or not x.is_contiguous() or not weight.is_contiguous() or x.is_neg():
        return False
    return x.numel() > 0 and not operator.is_observed(x, weight)


def epsilon(norm: Any) -> float:
    """Return what an RMSNorm adds to the mean square."""
    attributes = norm.__dict__
    return attributes["variance_epsilon"] if "variance_epsilon" in attributes else attributes["eps"]


def activation_of(mlp: PatchedMLP) -> nn.Module:
    """Return the activation module of a patched MLP."""
    name = mlp.family.activation
    return mlp._modules[name] if name in mlp._modules else getattr(mlp, name)  # getattr takes microseconds for a module


def activation_name(mlp: PatchedMLP) -> str:
    """Return the operator's name of the activation of a patched MLP that is fusible."""
    return ACTIVATION_OF_CLASS[type(activation_of(mlp))]


def dtype_of(projection: Any) -> torch.dtype:
    """Return the dtype that a projection computes in."""
    parameters = projection._parameters
    return parameters.get("scale", parameters["weight"]).dtype


def operands(mlp: PatchedMLP) -> Operands:
    """Return the weights of gate `[I, H]`, up `[I, H]` and down `[H, I]`, then their biases and scales.

    Where the neurons are split over ranks: this rank's shards, without the bias of down, which is added to the sum.
    """
    family, modules = mlp.family, mlp._modules
    gate, up, down = (modules[name]._parameters for name in (family.gate, family.up, family.down))
    if type(down["weight"]) not in _PLAIN:
        shards = gate["weight"], up["weight"], down["weight"], gate["bias"], up["bias"]
        return *map(sharding.local, shards), None, None, None, None  # pyright: ignore[reportReturnType]
    scales = gate.get("scale"), up.get("scale"), down.get("scale")
    if not family.packed:
        return gate["weight"], up["weight"], down["weight"], gate["bias"], up["bias"], down["bias"], *scales
    gate_weight, up_weight = gate["weight"].chunk(2)
    gate_bias, up_bias = (None, None) if gate["bias"] is None else gate["bias"].chunk(2)
    halves = (None, None) if scales[0] is None else scales[0].chunk(2)
    return gate_weight, up_weight, down["weight"], gate_bias, up_bias, down["bias"], *halves, scales[-1]


def _is_modified(module: nn.Module) -> bool:
    """Whether calling the module does more than run the forward of its class."""
    return has_hooks(module.__dict__) or not runs_forward_of(module, type(module))


def has_hooks(attributes: dict[str, Any]) -> bool:
    """Whether a module with these attributes has hooks of its calls."""
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    )


def runs_forward_of(module: nn.Module, owner: type[nn.Module]) -> bool:
    """Whether the forward that the module runs is that of the class `owner`."""
    attributes = module.__dict__
    if "forward" not in attributes:
        return True
    # accelerate wraps every module of a model that is split over devices, only to move its inputs to where they are
    # already (or, to offload, to bring weights from the meta device, where an MLP finds them too).
    wrapped = type(attributes.get("_hf_hook")) is AlignDevicesHook
    return getattr(attributes["_old_forward" if wrapped else "forward"], "__func__", None) is owner.forward


def _unsupported_activation(activation: object) -> str:
    return f"activation {type(activation).__name__} is not supported (allowed: silu and gelu_pytorch_tanh)"
