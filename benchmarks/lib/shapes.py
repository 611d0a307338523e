"""The shapes to measure: models, widths and numbers of tokens, in named sets; `--shapes` selects one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from csrc_triton.layout import PAD
from gluprune.measure.paper import RATIOS
from gluprune.measure.random_models import CONFIGS

# Hidden size and intermediate size.
MODELS = {name: (config.hidden_size, config.intermediate_size) for name, config in CONFIGS.items()}


def paper_widths(dense: int) -> tuple[int, ...]:
    """Return the study's exact widths, wide to narrow: 8192 -> 7373, 6554, 5735, 4916, 4096, 3277."""
    return tuple(dense - int(ratio * dense) for ratio in RATIOS)


def aligned(width: int) -> int:
    """Return the nearest multiple of 128, at least 128."""
    return max(1, round(width / PAD)) * PAD


def all_widths(dense: int) -> tuple[int, ...]:
    """Return the dense width, the study's widths, and their nearest multiples of 128, wide to narrow."""
    exact = paper_widths(dense)
    return tuple(sorted({dense, *exact, *map(aligned, exact)}, reverse=True))


@dataclass(frozen=True)
class ShapeSet:
    """A named set of shapes to measure.

    models: name -> hidden size and intermediate sizes.
    tokens: M of the forward; training_tokens: M of the forward with backward.
    repeats: measurements of each provider and shape.
    copied_bytes, gemm_size: sizes of the copy and of the square matrix product that measure the ceilings.
    layers: number of layers to rotate through; None: at least four, and more than fit into the cache.
    is_large: whether to run benchmarks marked `large`, with checkpoints of real sizes (45 GB on disk, minutes each).
    """

    dtype: torch.dtype
    models: dict[str, tuple[int, tuple[int, ...]]]
    tokens: tuple[int, ...]
    training_tokens: tuple[int, ...]
    repeats: int
    copied_bytes: int
    gemm_size: int
    layers: int | None = None
    is_large: bool = False

    def cases(self, tokens: tuple[int, ...]) -> list[tuple[str, int, int, int]]:
        """Return model, H, I and M of every case."""
        return [(name, H, I, M) for name, (H, widths) in self.models.items() for M in tokens for I in widths]


_TOKENS = (1, 8, 16, 64, 128, 512, 2048, 8192)
SETS = {
    "full": ShapeSet(
        dtype=torch.bfloat16,
        models={name: (MODELS[name][0], all_widths(MODELS[name][1])) for name in ("llama-3.2-1b", "llama-3.2-3b")},
        tokens=_TOKENS,
        training_tokens=_TOKENS,
        repeats=30,
        copied_bytes=1 << 30,
        gemm_size=8192,
        is_large=True,
    ),
    # Runs in minutes on two CPU cores. In float32, since few CPUs compute in bfloat16.
    "reduced": ShapeSet(
        dtype=torch.float32,
        models={"llama-3.2-1b": (2048, (8192, 4916, 4864))},
        tokens=(1, 128),
        training_tokens=(16,),
        repeats=5,
        copied_bytes=1 << 28,
        gemm_size=2048,
    ),
    # Only to check that every step runs; times at these sizes are meaningless.
    "tiny": ShapeSet(
        dtype=torch.float32,
        models={"tiny": (64, (256, 153))},
        tokens=(1, 16),
        training_tokens=(16,),
        repeats=3,
        copied_bytes=1 << 20,
        gemm_size=128,
        layers=2,
    ),
}
