"""What is measured: models, widths and token counts, in named sets of which `--shapes` chooses one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Hidden size and intermediate size.
MODELS = {"llama-3.2-1b": (2048, 8192), "llama-3.2-3b": (3072, 8192), "llama-3.1-8b": (4096, 14336)}
# The study (arXiv 2512.22671) removes these shares of the neurons.
PAPER_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def paper_widths(dense: int) -> list[int]:
    """The study's exact widths, wide to narrow: 8192 -> 7373, 6554, 5735, 4916, 4096, 3277."""
    return [dense - int(ratio * dense) for ratio in PAPER_RATIOS]


def aligned(width: int) -> int:
    """The nearest multiple of 128."""
    return max(128, round(width / 128) * 128)


def all_widths(dense: int) -> list[int]:
    """Dense, the study's widths, and the same aligned, wide to narrow."""
    exact = paper_widths(dense)
    return sorted({dense, *exact, *map(aligned, exact)}, reverse=True)


@dataclass(frozen=True)
class ShapeSet:
    """One choice of what to measure.

    dtype: of the kernel benchmarks; models: names in `MODELS`, or of your own in `hidden`.
    widths: intermediate sizes by model; tokens: M of the forward, training_tokens: M of forward with backward.
    is_large: whether the benchmarks of whole checkpoints run too (16 GB on the disk, minutes each).
    """

    dtype: torch.dtype
    hidden: dict[str, int]
    widths: dict[str, list[int]]
    tokens: tuple[int, ...]
    training_tokens: tuple[int, ...]
    is_large: bool
    repeats: int


_STUDIED = ("llama-3.2-1b", "llama-3.2-3b")
_TOKENS = (1, 8, 16, 64, 128, 512, 2048, 8192)

SETS = {
    # Everything.
    "full": ShapeSet(
        dtype=torch.bfloat16,
        hidden={name: MODELS[name][0] for name in _STUDIED},
        widths={name: all_widths(MODELS[name][1]) for name in _STUDIED},
        tokens=_TOKENS,
        training_tokens=_TOKENS,
        is_large=True,
        repeats=30,
    ),
    # What two cores of a CPU can do in minutes: dense, two odd widths of the study and the same aligned.
    "reduced": ShapeSet(
        dtype=torch.float32,  # CPUs without bfloat16 arithmetic are common
        hidden={"llama-3.2-1b": 2048},
        widths={"llama-3.2-1b": [8192, 7424, 7373, 4916, 4864]},
        tokens=(1, 16, 128),
        training_tokens=(128,),
        is_large=False,
        repeats=7,
    ),
    # No figure of these sizes means anything: they show that every step runs.
    "tiny": ShapeSet(
        dtype=torch.float32,
        hidden={"tiny": 64},
        widths={"tiny": [256, 153, 128]},
        tokens=(1, 16),
        training_tokens=(16,),
        is_large=False,
        repeats=3,
    ),
}
