"""`patch`: turn a loaded model's GLU MLPs into the fused operator, and `unpatch`: turn them back.

An MLP's class becomes a subclass of what it was, with another `forward`; nothing is rebound for other models, and the
module tree, the parameters, their names and the state dict stay. The fused path is taken only where it computes the
same thing. That is decided anew at every call, so hooks, adapters, autocast, offloading or sharding may come and go at
any time: while they are there, the MLP calls its modules as it always did.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn
from transformers.activations import ACT2FN

from gluprune.models.families import FAMILIES, GLU, Family
from gluprune.runtime import aligned, operator

logger = logging.getLogger(__name__)

_FAMILY_OF_CLASS = {family.mlp_class: family for family in FAMILIES.values()}
_ACTIVATION_OF_CLASS = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["swish"]): "silu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
}
_PLAIN = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True)
class MLPStatus:
    """One GLU MLP of a model.

    name: path of the module in the model.
    fused: whether its forward runs the fused operator.
    reason: why not; empty if fused.
    """

    name: str
    fused: bool
    reason: str


class FusedGLU:
    """What a patched MLP's class adds to the original class. All it knows is in the class, nothing in the instance."""

    original_class: type[nn.Module]
    family: Family
    backend: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _is_fusible(self, x):
            return super().forward(x)
        operands = _operands(self)
        gate, up, down, *_ = operands
        options = _ACTIVATION_OF_CLASS[type(_activation(self))], self.backend
        if torch.compiler.is_compiling():  # the operator looks at the storages at run time
            return operator.glu_mlp(x, *operands, *options)
        row = aligned.first_up_row(gate, up, down)
        if row is None:
            return super().forward(x)
        if operator.is_observed(x, *operands):
            return operator.glu_mlp(x, *operands, *options)
        return operator.run_kernels(x, row, *operands, *options)

    # Four events part the weights or move them to where alignment starts or ceases to help.

    def _apply(self, fn, recurse=True):  # .to(), .half(), .cuda(), ...
        super()._apply(fn, recurse)
        _settle(self)
        return self

    def train(self, mode: bool = True):
        super().train(mode)
        _settle(self)
        return self

    def __setstate__(self, state):  # copy.deepcopy, unpickling
        super().__setstate__(state)
        _settle(self)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        destination = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if not keep_vars:
            for name, parameter in self.named_parameters():
                if aligned.is_view(parameter) and prefix + name in destination:
                    destination[prefix + name] = aligned.with_own_storage(parameter)
        return destination

    def __reduce__(self):
        return _new_instance, (self.original_class, self.backend), self.__dict__


@functools.cache
def _fused_class(original: type[nn.Module], backend: str) -> type[nn.Module]:
    contents = {"original_class": original, "family": _FAMILY_OF_CLASS[original.__name__], "backend": backend}
    return type(f"Fused{original.__name__}", (FusedGLU, original), contents)


def _new_instance(original: type[nn.Module], backend: str) -> nn.Module:
    fused = _fused_class(original, backend)
    return fused.__new__(fused)


def _after_load(mlp: nn.Module, incompatible_keys) -> None:  # load_state_dict(assign=True) puts other weights in place
    _settle(mlp)


# --- when the fused operator computes the same thing ---


def _is_modified(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or not _runs_forward_of(module, type(module))


def _runs_forward_of(module: nn.Module, owner: type) -> bool:
    """Whether the forward that the module runs is that of the class `owner`."""
    attributes = module.__dict__
    if "forward" not in attributes:
        return True
    # accelerate wraps every module of a model that is split over devices, only to move its inputs to where they are
    # already (or, to offload, to bring weights from the meta device, where an MLP finds them too).
    wrapped = type(attributes.get("_hf_hook")) is AlignDevicesHook
    return getattr(attributes["_old_forward" if wrapped else "forward"], "__func__", None) is owner.forward


def _obstacle(mlp: nn.Module) -> str | None:
    """Why calling a patched MLP's modules could differ from the fused operator on their weights; None if it cannot."""
    family = mlp.family
    activation = _activation(mlp)
    if type(activation) not in _ACTIVATION_OF_CLASS:
        return _unsupported_activation(activation)
    if _is_modified(activation):
        return f"{family.activation} carries a hook"
    for name in (family.gate, family.up, family.down):
        projection = mlp._modules[name]
        if type(projection) is not nn.Linear:
            return f"{name} is {type(projection).__module__.partition('.')[0]}'s {type(projection).__name__}"
        if _is_modified(projection):
            return f"{name} carries a hook"
        weight = projection._parameters["weight"]
        if type(weight) not in _PLAIN:
            return f"{name}.weight is {type(weight).__name__}"
    gate, up, down, *biases = _operands(mlp)
    dtype, device = down.dtype, down.device
    if dtype not in operator.KERNEL_DTYPES:
        return f"the weights are {str(dtype).removeprefix('torch.')}"
    if device.type == "meta":
        return "the weights are on the meta device (offloaded, or not loaded)"
    for other in (gate, up, *biases):
        if other is not None and (type(other) not in _PLAIN or other.dtype != dtype or other.device != device):
            return "the weights differ in dtype, device or kind"
    for bias, size in zip(biases, (*gate.shape[:1], *up.shape[:1], *down.shape[:1])):
        if bias is not None and (bias.shape != (size,) or not bias.is_contiguous()):
            return "the biases' shapes do not fit together"
    if down.dim() != 2 or gate.shape != up.shape or gate.shape != down.shape[::-1]:
        return "the weights' shapes do not fit together"
    return None


def _activation(mlp: nn.Module) -> object:
    name = mlp.family.activation
    return mlp._modules[name] if name in mlp._modules else getattr(mlp, name)  # getattr takes microseconds for a module


def _operands(mlp: nn.Module) -> tuple[torch.Tensor | None, ...]:
    """Weights of gate `[I, H]`, up `[I, H]` and down `[H, I]`, then their biases."""
    family, modules = mlp.family, mlp._modules
    gate, up, down = (modules[name]._parameters for name in (family.gate, family.up, family.down))
    if not family.packed:
        return gate["weight"], up["weight"], down["weight"], gate["bias"], up["bias"], down["bias"]
    halves = [(None, None) if packed is None else packed.chunk(2) for packed in (gate["weight"], gate["bias"])]
    (gate_weight, up_weight), (gate_bias, up_bias) = halves
    return gate_weight, up_weight, down["weight"], gate_bias, up_bias, down["bias"]


def _is_fusible(mlp: nn.Module, x: torch.Tensor) -> bool:
    """Whether the fused operator computes what the MLP's modules compute for `x`, here and now."""
    if not operator.uses_kernels(mlp.backend, x.device) or torch.is_autocast_enabled(x.device.type):
        return False
    # The flag, not `is_exporting()`, which is always true in what torch.compile compiles up to torch 2.11.
    if torch.compiler._is_exporting_flag or torch.jit.is_tracing():
        return False  # an exported program holds PyTorch's operators alone, and so runs without this package
    if type(x) not in _PLAIN or _obstacle(mlp) is not None or nn.modules.module._has_any_global_hook():
        return False
    down = mlp._modules[mlp.family.down]._parameters["weight"]
    if x.dtype != down.dtype or x.device != down.device or x.shape[-1] != down.shape[0]:
        return False
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


def _unsupported_activation(activation: object) -> str:
    return f"activation {type(activation).__name__} is not supported (allowed are silu and gelu_pytorch_tanh)"


# --- storage ---


def _settle(mlp: nn.Module) -> None:
    """Bring the weights of a patched MLP into the storage that its backend, device and mode want."""
    for parameter in mlp.parameters():
        # The rows of a padded down projection have gaps between them, which fused optimizers refuse on CUDA and overrun
        # on the CPU: such an MLP trains on plain weights.
        if not operator.uses_kernels(mlp.backend, parameter.device) or (mlp.training and not parameter.is_contiguous()):
            aligned.separate(parameter)
    if _obstacle(mlp) is not None:
        return
    weights = [projection.weight for projection in GLU(mlp.family, mlp).projections.values()]
    *_, down = weights
    if not operator.uses_kernels(mlp.backend, down.device) or (mlp.training and down.shape[1] % aligned.ALIGNMENT):
        return
    if all(map(aligned.is_alone, weights)):
        align = aligned.align_packed if mlp.family.packed else aligned.align
        align(*weights)


# --- finding and changing MLPs ---


def _glu_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of the table that a module is an instance of, patched or of a subclass as well; None if of none."""
    for owner in type(module).__mro__:
        if owner.__name__ in _FAMILY_OF_CLASS and owner.__module__.startswith("transformers.models."):
            return owner
    return None


def _find_glus(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if _glu_class(module) is not None)


def _why_left(mlp: nn.Module) -> str | None:
    """Why the class of an MLP must not be swapped; None if it may."""
    owner = _glu_class(mlp)
    if type(mlp) is not owner and not _is_patched(mlp):
        return f"{type(mlp).__name__} is a class made of {owner.__name__}"
    if owner.forward.__module__ != owner.__module__ or owner.forward.__qualname__ != f"{owner.__qualname__}.forward":
        return (
            f"the forward of {owner.__name__} was replaced by {owner.forward.__module__}.{owner.forward.__qualname__}"
        )
    if not _runs_forward_of(mlp, type(mlp)):
        return "its forward was replaced"
    activation = getattr(mlp, _FAMILY_OF_CLASS[owner.__name__].activation)
    if type(activation) not in _ACTIVATION_OF_CLASS:
        return _unsupported_activation(activation)
    return None


def _is_patched(mlp: nn.Module) -> bool:
    """Whether `patch` gave the MLP its class, and nobody subclassed it since."""
    return "original_class" in vars(type(mlp)) and isinstance(mlp, FusedGLU)


def _set_class(mlp: nn.Module, new: type[nn.Module]) -> None:
    old = type(mlp)
    for name in ("forward", "_old_forward"):  # accelerate leaves bound methods behind
        if getattr(mlp.__dict__.get(name), "__func__", None) is old.forward:
            mlp.__dict__[name] = types.MethodType(new.forward, mlp)
    mlp.__class__ = new


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if compiled and any(True for _ in _find_glus(module)):
            label = f"module {name!r}" if name else "the model"
            raise ValueError(f"{label} is compiled: patch and unpatch before torch.compile")


def patch(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Let the GLU MLPs of a model run as one fused operator; `unpatch` undoes it. All or nothing, idempotent.

    Works on whatever holds MLP classes of `gluprune.models.families.FAMILIES` (a causal LM, its bare decoder, a wrapped model)
    and touches only them. Where kernels run, the weights move into aligned storage (`gluprune.runtime.aligned`), one layer at a
    time: no weight exists twice, and checkpoints are saved bit for bit as before. On the CPU, and wherever hooks,
    adapters, autocast, quantized, offloaded or sharded weights are found at a call, an MLP calls its modules as it did
    unpatched. What torch.compile has compiled before, of any model, is compiled anew at its next call, since it may hold
    the unpatched MLPs. Writes one line to the log; `fusion_status` tells the same as data. Patch again after other code has
    replaced weights.

    Args:
        model: changed in place.
        backend: "auto" (kernels on CUDA, Triton or cuBLAS by shape; PyTorch elsewhere), "triton", "cublas" (either
            where kernels can run) or "torch" (PyTorch everywhere).

    Returns:
        The model.

    Raises:
        TypeError: not a module.
        ValueError: no MLP of a supported family or none with a supported activation; an unknown backend, or one that
            cannot run here; a compiled module. The model is unchanged.
    """
    operator.check_backend(backend)
    _check_model(model)
    glus = list(_find_glus(model))
    if not glus:
        raise ValueError(
            f"{type(model).__name__} holds no GLU MLP of a supported family: allowed are {', '.join(_FAMILY_OF_CLASS)}"
        )
    left = [_why_left(mlp) for _, mlp in glus]
    if all(left) and not any(isinstance(mlp, FusedGLU) for _, mlp in glus):
        raise ValueError(f"no MLP of {type(model).__name__} can be patched: {_summary(left)}")

    before = [type(mlp) for _, mlp in glus]
    with ExitStack() as undo:
        for (_, mlp), reason in zip(glus, left):
            if reason is None:
                undo.callback(_set_class, mlp, type(mlp)) if _is_patched(mlp) else undo.callback(_unpatch, mlp)
                _patch(mlp, backend)
        undo.pop_all()
    if before != [type(mlp) for _, mlp in glus]:
        _forget_compiled()
    status = fusion_status(model)
    reasons = [entry.reason for entry in status if not entry.fused]
    line = f"{len(status) - len(reasons)} of {len(status)} MLPs are fused (backend {backend})"
    logger.info(line + (f"; left as they are: {_summary(reasons)}" if reasons else ""))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: every MLP gets its class back and every weight plain memory of its own. Nothing of it stays behind.

    Returns:
        The model; unchanged if none of its MLPs is patched.

    Raises:
        TypeError: not a module.
        ValueError: a compiled module, or an MLP whose class was wrapped again since. The model is unchanged.
    """
    _check_model(model)
    patched = [(name, mlp) for name, mlp in _find_glus(model) if isinstance(mlp, FusedGLU)]
    for name, mlp in patched:
        if not _is_patched(mlp):
            raise ValueError(f"{name} became {type(mlp).__name__} after it was patched: undo that first")
    for _, mlp in patched:
        _unpatch(mlp)
    if patched:
        _forget_compiled()
    return model


def _forget_compiled() -> None:
    """Let torch.compile compile anew: up to torch 2.11 what it has compiled of a model does not notice another class.

    Code around the model holds its old MLPs (`generate` compiles the model's forward for a static cache, for one).
    """
    if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled, and its import takes seconds
        torch.compiler.reset()


patch_llama = patch
unpatch_llama = unpatch


def _patch(mlp: nn.Module, backend: str) -> None:
    original = _glu_class(mlp)
    _set_class(mlp, _fused_class(original, backend))
    if _after_load not in mlp._load_state_dict_post_hooks.values():
        mlp.register_load_state_dict_post_hook(_after_load)
    _settle(mlp)


def _unpatch(mlp: nn.Module) -> None:
    _set_class(mlp, mlp.original_class)
    hooks = mlp._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _after_load]:
        del hooks[key]
    for parameter in mlp.parameters():
        aligned.separate(parameter)


# --- what is fused ---


def fusion_status(model: nn.Module) -> list[MLPStatus]:
    """For every GLU MLP of a supported family in the model, in order: whether it runs fused, and why not."""
    status = []
    for name, mlp in _find_glus(model):
        reason = _why_not_fused(mlp)
        status.append(MLPStatus(name, fused=not reason, reason=reason))
    return status


def fusion_prospect(model: nn.Module) -> list[MLPStatus]:
    """For every GLU MLP of a supported family, in order: whether `patch` would fuse it where kernels run, and why not.

    Looks at classes alone, so that a model on the meta device will do.
    """
    prospect = []
    for name, mlp in _find_glus(model):
        reason = _why_left(mlp) or ""
        prospect.append(MLPStatus(name, fused=not reason, reason=reason))
    return prospect


def _why_not_fused(mlp: nn.Module) -> str:
    if not isinstance(mlp, FusedGLU):
        return _why_left(mlp) or "not patched"
    if not _runs_forward_of(mlp, type(mlp)):
        return "its forward was replaced"
    if obstacle := _obstacle(mlp):
        return obstacle
    gate, up, down, *_ = _operands(mlp)
    if not operator.uses_kernels(mlp.backend, down.device):
        return f"backend {mlp.backend!r} runs PyTorch's operators on {down.device.type}"
    if aligned.is_aligned(gate, up, down):
        return ""
    if mlp.training and down.shape[1] % aligned.ALIGNMENT:
        return f"its width {down.shape[1]} is no multiple of {aligned.ALIGNMENT}, and it is in training mode"
    return "its weights are not in aligned storage: patch again"


def _summary(reasons: list[str]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in Counter(reasons).items())
