"""The providers of a GLU MLP: gluprune and its peers, all on the same weights.

A provider builds a module from gate and up `[I, H]` and down `[H, I]`. An exception, when it is built or first run,
means that the provider does not support the shape or the machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from csrc_triton.layout import PAD
from gluprune.runtime import operator
from gluprune.runtime.patching import patch

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # gate, up [I, H], down [H, I]


@functools.lru_cache(maxsize=2)
def _config(rows: int, columns: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=columns, intermediate_size=rows, hidden_act="silu")


def _filled(module: nn.Module, weights: Weights) -> nn.Module:
    """Replace the parameters of a module on the meta device with parameters that share the memory of `weights`."""
    for name, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
        getattr(module, name).weight = nn.Parameter(weight.detach())
    return module.train()


def eager(weights: Weights) -> nn.Module:
    with torch.device("meta"):
        module = LlamaMLP(_config(*weights[0].shape))
    return _filled(module, weights)


def eager_padded(weights: Weights) -> nn.Module:
    """Pad the width with zeros to a multiple of 128, which does not change the result."""
    missing = -weights[0].shape[0] % PAD
    if not missing:
        raise ValueError("the width is already a multiple of 128: nothing to pad")
    gate, up, down = weights
    return eager((F.pad(gate, (0, 0, 0, missing)), F.pad(up, (0, 0, 0, missing)), F.pad(down, (0, missing))))


class _Compiled(nn.Module):
    """One compiled function for all layers, with the weights as arguments."""

    # torch.compile's CUDA graphs would be nested in the timer's.
    mlp = staticmethod(
        torch.compile(
            lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
            mode="max-autotune-no-cudagraphs",
            dynamic=False,
            fullgraph=True,
        )
    )

    def __init__(self, weights: Weights):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight.detach()) for weight in weights])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x, *self.weights)


def liger_swiglu(weights: Weights) -> nn.Module:
    from liger_kernel.transformers import LigerSwiGLUMLP

    with torch.device("meta"):
        module = LigerSwiGLUMLP(_config(*weights[0].shape))
    return _filled(module, weights)


def liger_fused(weights: Weights) -> nn.Module:
    from liger_kernel.transformers import LigerMLP

    with torch.device("meta"):
        module = LigerMLP(_config(*weights[0].shape))
    return _filled(module, weights)


def flash_swiglu(weights: Weights) -> nn.Module:
    from flash_swiglu_mlp import FlashSwiGLUMLP

    module = FlashSwiGLUMLP(*weights[0].shape[::-1], device="meta")
    return _filled(module, weights)


def gluprune(weights: Weights, backend: str) -> nn.Module:
    operator.check_backend(backend)
    return patch(eager(weights), backend)


def gluprune_fp8(weights: Weights) -> nn.Module:
    return patch(eager(weights), weights="fp8")


ROUNDED = ("gluprune, fp8",)  # compared with float64 of the rounded weights, which are one byte each
PROVIDERS: dict[str, Callable[[Weights], nn.Module]] = {
    "eager": eager,
    "eager, padded": eager_padded,
    "torch.compile": _Compiled,
    "LigerSwiGLUMLP": liger_swiglu,
    "LigerMLP": liger_fused,
    "flash-swiglu-mlp": flash_swiglu,
    "gluprune": functools.partial(gluprune, backend="auto"),
    "gluprune, cublas": functools.partial(gluprune, backend="cublas"),
    "gluprune, triton": functools.partial(gluprune, backend="triton"),
    "gluprune, fp8": gluprune_fp8,
}
