"""`patch`: make the GLU MLPs of a loaded model run as one fused operator, and `unpatch`: undo it.

The class of an MLP becomes a subclass of its former class, with another `forward`. Other models, the module tree, the
parameters, their names and the state dict stay as they are. The fused operator runs only if it computes what the
modules compute. This is checked at every call, so hooks, adapters, autocast, offloading or sharding may be added and
removed: as long as they are present, the MLP calls its modules.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from gluprune.models.families import Family
from gluprune.models.glu import GLU
from gluprune.models.wrappers import is_compiled
from gluprune.runtime import aligned, fp8, fusion, operator, sharding
from gluprune.runtime.classes import PREPARED, Swapped, fused_class, set_class
from gluprune.runtime.norms import FusedNorm, patch_norms, unpatch_norms
from gluprune.runtime.operator import layout
from gluprune.runtime.prepared import PreparedMLP, keep_prepared, run_prepared

logger = logging.getLogger(__name__)


class FusedGLU(Swapped):
    """The forward of a patched MLP."""

    family: Family

    @staticmethod
    def class_attributes(original: type[nn.Module]) -> dict[str, Any]:
        """Return the entry of the table of families."""
        return {"family": fusion.FAMILY_OF_CLASS[original.__name__]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the original forward returns for `x` `[..., H]`."""
        if torch.compiler.is_compiling():
            if not fusion.is_fusible(self, x):
                return super().forward(x)
            return self._operator(x, fusion.operands(self))  # which looks at the storages at run time
        y = run_prepared(self, x)
        if y is not None:
            return y
        if not fusion.is_fusible(self, x):
            return super().forward(x)
        operands = fusion.operands(self)
        are_gathered = sharding.is_under_fsdp(self)
        if are_gathered or operator.is_observed(x, *operands):
            if not are_gathered and layout.first_up_row(*operands[:2]) is None:
                return super().forward(x)
            y = self._operator(x, operands)  # which takes them apart, too, and pads down where necessary
        else:
            up_row = layout.first_up_row(*operands[:3])
            if up_row is None:
                return super().forward(x)
            keep_prepared(self, lambda: PreparedMLP.of(self, up_row))
            y = operator.run_kernels(x, up_row, operands, fusion.activation_name(self), self.backend)
        group = sharding.group_of(self)
        return y if group is None else sharding.sum_over_ranks(y, self, group)

    def _operator(self, x: torch.Tensor, operands: fusion.Operands) -> torch.Tensor:
        options = fusion.activation_name(self), self.backend
        return operator.glu_mlp(x, *operands[:6], *options, *operands[6:])

    # Four events replace the weights, or move them to where aligned storage starts or stops helping.

    def _apply(self, fn, recurse=True):  # .to(), .half(), .cuda(), ...
        super()._apply(fn, recurse)
        _settle(self)
        return self

    def train(self, mode: bool = True):
        """Set the mode; a down projection of an unaligned width leaves the aligned storage in training mode."""
        super().train(mode)
        _settle(self)
        return self

    def __setstate__(self, state):  # copy.deepcopy, unpickling
        super().__setstate__(state)
        _settle(self)

    def state_dict(self, *args, destination: Any = None, prefix="", keep_vars=False):
        """Return the state dict; tensors in aligned storage get storage objects that span only themselves.

        A down projection of an unaligned width has gaps between rows and is copied: safetensors saves no such tensor.
        """
        destination = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if not keep_vars:
            for name, parameter in self.named_parameters():
                saved = destination.get(prefix + name)
                if aligned.is_view(parameter) and saved is not None and saved.data_ptr() == parameter.data_ptr():
                    own = aligned.with_own_storage(parameter)
                    destination[prefix + name] = own if own.is_contiguous() else own.contiguous()
        return destination


def patch(
    model: nn.Module, backend: str = "auto", *, norms: bool | None = None, weights: str | None = None
) -> nn.Module:
    """Make the GLU MLPs and RMSNorms of a model run as fused kernels, in place. All or nothing, idempotent.

    Works on any module that contains MLP classes of `gluprune.models.families.FAMILIES` (a causal LM, its bare decoder,
    a wrapped model) and changes nothing else. Where kernels run, the weights move into aligned storage
    (`gluprune.runtime.aligned`), one layer at a time. No weight exists twice, and saved checkpoints stay bit for bit
    the same. On the CPU, and wherever a call finds hooks, adapters, autocast, quantized or offloaded weights,
    an MLP calls its modules as it did before. Norms run fused where no gradient is needed; they round as the family's
    eager code rounds. See `unpatch`.

    All that torch.compile has compiled is compiled again at its next call, since it may contain the unpatched MLPs. One
    line goes to the log; `fusion_status` returns the same as data. Patch again after other code has replaced weights.

    Args:
        model: Any module with GLU MLPs of a supported family; changed in place.
        backend: "auto" (kernels on CUDA, Triton or cuBLAS by shape; PyTorch elsewhere), "triton", "cublas" (either
            only where kernels can run) or "torch" (PyTorch everywhere).
        norms: Whether norms run fused, too. None: those on CUDA do.
        weights: "fp8" rounds the weights of gate, up and down to 8 bits, for good: `unpatch` restores the modules with
            the rounded weights (`gluprune.runtime.fp8`). None leaves the weights as they are.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module.
        ValueError: No MLP of a supported family or none with a supported activation, an unknown backend or one that
            cannot run here, a compiled module, or weights that cannot be rounded. The model is unchanged.

    Example:
        >>> import gluprune
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
        >>> model = gluprune.patch(LlamaForCausalLM(config))
        >>> type(model.model.layers[0].mlp).__name__
        'FusedLlamaMLP'
    """
    operator.check_backend(backend)
    if weights not in (None, "fp8"):
        raise ValueError(f"unknown weights {weights!r}; allowed: None, 'fp8'")
    _check_model(model)
    mlps = [mlp for _, mlp in fusion.find_glus(model)]
    if not mlps:
        allowed = ", ".join(fusion.FAMILY_OF_CLASS)
        raise ValueError(f"{type(model).__name__} holds no GLU MLP of a supported family; allowed: {allowed}")
    obstacles = [fusion.class_obstacle(mlp) for mlp in mlps]
    if all(obstacles) and not any(map(fusion.has_fused_forward, mlps)):
        raise ValueError(f"no MLP of {type(model).__name__} can be patched: {fusion.summary(obstacles)}")

    rounded = [] if weights is None else _to_round(model)

    before = [type(mlp) for mlp in mlps]
    with ExitStack() as undo:
        for mlp, obstacle in zip(mlps, obstacles, strict=True):
            if obstacle is not None:
                continue
            if fusion.is_patched(mlp):
                undo.callback(set_class, mlp, type(mlp))
            else:
                undo.callback(_unpatch, mlp)
            _patch(mlp, backend)
        patch_norms(model, backend, norms, undo)
        undo.pop_all()
    for mlp in rounded:
        fp8.round_weights(mlp)
        _settle(mlp)
    if rounded or before != [type(mlp) for mlp in mlps]:
        _forget_compiled()
    status = fusion.fusion_status(model)
    reasons = [entry.reason for entry in status if not entry.fused]
    norms_found = [module for module in model.modules() if fusion.norm_class(module) is not None]
    fused_norms = sum(isinstance(norm, FusedNorm) for norm in norms_found)
    line = f"{len(status) - len(reasons)} of {len(status)} MLPs and {fused_norms} of {len(norms_found)} norms are fused"
    line += f" (backend {backend})"
    if eight_bit := sum(fp8.is_rounded(mlp) for mlp in mlps):
        line += f", {eight_bit} MLPs with fp8 weights"
    has_effect = len(reasons) < len(status) or fused_norms
    level = logging.INFO if has_effect else logging.WARNING
    logger.log(level, line + (f"; not fused: {fusion.summary(reasons)}" if reasons else ""))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: MLPs and norms get their original classes back, and every weight gets unshared contiguous memory.

    fp8 weights become weights of the dtype that the model has now, with the rounded values.

    Args:
        model: Any module; changed in place.

    Returns:
        The model. It is unchanged if none of its MLPs is patched.

    Raises:
        TypeError: `model` is not a module.
        ValueError: A compiled module, or an MLP whose class was subclassed after it was patched. The model is
            unchanged.

    Example:
        >>> import gluprune
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
        >>> model = gluprune.unpatch(gluprune.patch(LlamaForCausalLM(config)))
        >>> type(model.model.layers[0].mlp).__name__
        'LlamaMLP'
    """
    _check_model(model)
    patched = [(name, mlp) for name, mlp in fusion.find_glus(model) if isinstance(mlp, FusedGLU)]
    for name, mlp in patched:
        if not fusion.is_patched(mlp):
            raise ValueError(f"{name} became {type(mlp).__name__} after it was patched: undo that change first")
    for _, mlp in patched:
        _unpatch(mlp)
    unpatch_norms(model)
    if patched:
        _forget_compiled()
    return model


patch_llama = patch
unpatch_llama = unpatch


def realign(mlps: Iterable[nn.Module]) -> None:
    """Move the weights of patched MLPs back into the storage that they run on, after weights were replaced.

    Other modules are left unchanged.
    """
    for mlp in mlps:
        if isinstance(mlp, FusedGLU):
            _settle(mlp)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if is_compiled(module) and any(True for _ in fusion.find_glus(module)):
            label = f"module {name!r}" if name else "the model"
            raise ValueError(f"{label} is compiled: patch and unpatch before torch.compile")


def _patch(mlp: nn.Module, backend: str) -> None:
    original = fusion.glu_class(mlp)
    assert original is not None
    set_class(mlp, fused_class(FusedGLU, original, backend))
    if _after_load not in mlp._load_state_dict_post_hooks.values():
        mlp.register_load_state_dict_post_hook(_after_load)
    _settle(mlp)


def _to_round(model: nn.Module) -> list[nn.Module]:
    """Return the MLPs that can be patched and have no fp8 weights yet; raise ValueError if any cannot have them."""
    found = {name: mlp for name, mlp in fusion.find_glus(model) if fusion.class_obstacle(mlp) is None}
    found = {name: mlp for name, mlp in found.items() if not fp8.is_rounded(mlp)}
    for name, mlp in found.items():
        fp8.check(name, mlp, fusion.family_of(mlp))
    return list(found.values())


def _unpatch(mlp: fusion.PatchedMLP) -> None:
    fp8.restore_linears(mlp)
    parameters = sharding.movable_parameters(mlp)
    set_class(mlp, mlp.original_class)
    hooks = mlp._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _after_load]:
        del hooks[key]
    for parameter in parameters:
        aligned.separate(parameter)


def _after_load(mlp: fusion.PatchedMLP, incompatible_keys) -> None:
    _settle(mlp)  # load_state_dict(assign=True) puts other weights in place


def _settle(mlp: fusion.PatchedMLP) -> None:
    """Move the weights of a patched MLP into the storage that its backend, device and mode require."""
    mlp.__dict__.pop(PREPARED, None)
    trains = fusion.trains(mlp)
    for parameter in sharding.movable_parameters(mlp):
        # The rows of a padded down projection have gaps between them. Fused optimizers refuse these on CUDA and overrun
        # them on the CPU, so in training it is contiguous, and the operator pads a copy.
        if not operator.uses_kernels(mlp.backend, parameter.device) or (trains and not parameter.is_contiguous()):
            aligned.separate(parameter)
    if sharding.is_under_fsdp(mlp) or fusion.module_obstacle(mlp) is not None:
        return
    projections = GLU(mlp.family, mlp).projections.values()
    weights: list[Any] = [sharding.local(projection.weight) for projection in projections]
    *_, down = weights
    if not operator.uses_kernels(mlp.backend, down.device):
        return
    # On the CPU, transformers leaves the shards of gate and up in the memory of the whole weights, which it dropped.
    if sharding.group_of(mlp) is not None or all(map(aligned.is_alone, weights)):
        if trains and down.shape[1] % aligned.ALIGNMENT:
            weights[-1] = None
        align = aligned.align_packed if mlp.family.packed else aligned.align
        align(*weights)


def _forget_compiled() -> None:
    """Make torch.compile compile again: up to torch 2.11, compiled code does not notice that a class was swapped.

    Code around the model may hold its old MLPs, too: `generate` compiles the model's forward for a static cache.
    """
    if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled, and its import takes seconds
        torch.compiler.reset()
