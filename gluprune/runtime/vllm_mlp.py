"""The fused operator in vLLM's Llama MLP, on the neurons of one tensor-parallel rank.

vLLM packs gate and up in one weight, as `csrc_triton.layout` allows. If a rank has a multiple of 128 neurons, weights
stay where vLLM put them; otherwise they move into padded storage, one layer at a time. They stay the same parameters,
so vLLM can load others into them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from gluprune.runtime import aligned, fusion, operator
from gluprune.runtime.classes import Swapped, fused_class, set_class
from gluprune.runtime.operator import layout

logger = logging.getLogger("vllm.gluprune")  # below the logger that vLLM configures
MIB = 2**20
MLPS = ("LlamaMLP", "Qwen2MLP")  # which vLLM also uses for Mistral and Phi-3, and for Qwen3
PROJECTIONS = ("gate_up_proj", "down_proj")


class FusedVllmMLP(Swapped):
    """The forward of a fused MLP of vLLM."""

    gate_up_proj: Any
    down_proj: Any

    @staticmethod
    def class_attributes(original: type[nn.Module]) -> dict[str, Any]:
        """Return no attributes."""
        return {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the original forward returns for `x` `[M, H]`.

        The operator is opaque to torch.compile, and chooses the kernels by M when it runs.
        """
        gate, up = self.gate_up_proj.weight.chunk(2)
        down = self.down_proj
        y = operator.glu_mlp(x, gate, up, down.weight, None, None, None, "silu", self.backend)
        if down.reduce_results and down.tp_size > 1:
            from vllm.distributed import tensor_model_parallel_all_reduce  # pyright: ignore[reportMissingImports]

            return tensor_model_parallel_all_reduce(y)
        return y


def fuse_mlps(model: nn.Module, backend: str, *, reason: str | None = None) -> None:
    """Make the MLPs of a model of vLLM run as one operator, in place, and log a line that says how many.

    The weights are loaded, and vLLM has not prepared them for its own kernels yet. MLPs for which `obstacle` has a
    reason stay as they are.

    Args:
        model: A model of vLLM.
        backend: "auto", or "torch" for PyTorch's operations on any device.
        reason: Why none can be fused, if there is a reason that concerns the whole model.
    """
    mlps = [module for module in model.modules() if _is_mlp(module)]
    reasons = [reason or obstacle(mlp, backend) for mlp in mlps]
    padding = 0
    for mlp, why in zip(mlps, reasons, strict=True):
        if why is None:
            padding += _fuse(mlp, backend)
    line = f"gluprune: {reasons.count(None)} of {len(mlps)} MLPs are fused (backend {backend})"
    line += f"; padding takes {padding / MIB:.1f} MiB" if padding else ""
    left = fusion.summary(reasons)
    logger.info(line + (f"; not fused: {left}" if left else ""))


def obstacle(mlp: Any, backend: str) -> str | None:
    """Return why an MLP of vLLM has to stay as it is, or None if it can be fused."""
    if type(mlp.act_fn).__name__ != "SiluAndMul":
        return f"activation {type(mlp.act_fn).__name__} is not supported (allowed: SiluAndMul)"
    for name in PROJECTIONS:
        projection = getattr(mlp, name)
        method = type(projection.quant_method).__name__
        if method != "UnquantizedLinearMethod":
            return f"{name} is quantized ({method})"
        if projection.bias is not None:
            return f"{name} has a bias"
        weight = projection.weight
        if weight.dtype not in operator.KERNEL_DTYPES:
            return f"{name} is {str(weight.dtype).removeprefix('torch.')}"
        if weight.is_meta or getattr(weight, "_vllm_is_uva_offloaded", False):
            return f"{name} is offloaded"
        if not (weight.is_contiguous() and layout.storage_elements(weight) == weight.numel()):
            return f"{name} shares its memory, or is not contiguous"
        if backend != "torch" and not operator.uses_kernels(backend, weight.device):
            return f"no kernels run on {weight.device.type}"
    return None


def _is_mlp(module: nn.Module) -> bool:
    return type(module).__name__ in MLPS and type(module).__module__.startswith("vllm.")


def _fuse(mlp: Any, backend: str) -> int:
    """Fuse an MLP for which there is no obstacle; returns the bytes that padding takes."""
    weights = [getattr(mlp, name).weight for name in PROJECTIONS]
    aligned.align_packed(*weights)
    for name in PROJECTIONS:
        getattr(mlp, name)._cpu_skip_gemm_dispatch = True  # else vLLM packs the weight on the CPU and empties it
    set_class(mlp, fused_class(FusedVllmMLP, type(mlp), backend))
    return sum((layout.storage_elements(weight) - weight.numel()) * weight.element_size() for weight in weights)
