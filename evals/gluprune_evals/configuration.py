"""`Configuration`: what a result of the study describes, in addition to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gluprune.pruning.recipe import Recipe
from gluprune.pruning.widths import percent_hint

UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Configuration:
    """A recipe at a pruning ratio, or the model as it was given.

    Attributes:
        recipe: How the model is pruned. None: not at all; the model may have been pruned before.
        ratio: Share of the neurons removed.

    Raises:
        ValueError: The ratio is not between 0 and 1.
    """

    recipe: Recipe | None = None
    ratio: float = 0.0

    def __post_init__(self):
        if self.recipe and not 0 < self.ratio < 1:
            raise ValueError(
                f"pruning ratios must lie between 0 and 1 (both excluded), got {self.ratio}{percent_hint(self.ratio)}"
            )

    @property
    def multiple_of(self) -> int:
        """The widths are multiples of this."""
        return self.recipe.multiple_of if self.recipe else 1

    def to_dict(self) -> dict:
        """Return the fields as they appear in a result."""
        return {"recipe": self.recipe and str(self.recipe), "ratio": self.ratio, "multiple_of": self.multiple_of}

    def __str__(self) -> str:
        if self.recipe is None:
            return UNCHANGED
        return f"{self.recipe}-{self.ratio:g}" + (f"-multiple-of-{self.multiple_of}" if self.multiple_of > 1 else "")


def grid(ratios: Sequence[float], recipes: Sequence[Recipe]) -> list[Configuration]:
    """Return the unchanged model, then every recipe at every ratio.

    Raises:
        ValueError: A recipe that the study does not support.
    """
    for recipe in recipes:
        if recipe.reconstruct or recipe.allocation != "uniform":
            raise ValueError(f"the study takes SCORE or SCORE+compensate, got {recipe}")
    return [Configuration(), *(Configuration(recipe, ratio) for recipe in recipes for ratio in ratios)]
