"""`Recipe`: how neurons are ranked, how the remaining weights are refitted, and how widths are chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from gluprune.models.consumers import consumer
from gluprune.pruning.scores import CALIBRATED_SCORES, STATIC_SCORES, Score

ALLOCATIONS = ("uniform", "sensitivity")
SCORES = (*STATIC_SCORES, *CALIBRATED_SCORES)


@dataclass(frozen=True)
class Needs:
    """What a recipe needs besides the weights of the model.

    Attributes:
        argument: The first argument of `prune` that needs calibration data, as the caller writes it. Empty if none
            does.
        gram: Whether the statistics must hold Gram matrices.
        sensitivity: Whether the statistics must hold sensitivities. They always come with Gram matrices.
    """

    argument: str
    gram: bool
    sensitivity: bool

    @property
    def calibration(self) -> bool:
        """Whether calibration data is needed at all."""
        return bool(self.argument)


@dataclass(frozen=True)
class Recipe:
    """The choices that decide the quality of a pruned model; the width is chosen separately.

    Attributes:
        score: Name of the score that ranks neurons, or a callable that takes gate `[I, H]`, up `[I, H]` and down
            `[H, I]` and returns `[I]`; higher is kept. See `gluprune.pruning.scores`.
        compensate: Whether the down projections are refitted to the remaining neurons by least squares.
        allocation: "uniform" gives every layer the same width, "sensitivity" gives sensitive layers more neurons.
        reconstruct: Whether `gluprune.reconstruct` follows. `prune` itself does not run it: it needs the dense model.
        multiple_of: Widths are rounded to the nearest multiple of this.
        deploy: Where the model will run, a name in `gluprune.models.consumers.CONSUMERS`: widths are also multiples of
            what it needs. None adds nothing.

    Raises:
        ValueError: An unknown score, allocation or `deploy`, or a `multiple_of` below 1.
        TypeError: `compensate` or `reconstruct` is not a bool.

    Example:
        >>> from gluprune import Recipe
        >>> recipe = Recipe.parse("surgeon+compensate+reconstruct")
        >>> recipe.needs.sensitivity
        True
        >>> recipe.options()
        {'score': 'surgeon', 'compensate': True, 'allocation': 'uniform', 'multiple_of': 128, 'deploy': None}
        >>> Recipe(deploy="llama.cpp").width_multiple
        256
    """

    score: str | Score = "maw_gud"
    compensate: bool = False
    allocation: str = "uniform"
    reconstruct: bool = False
    multiple_of: int = 128
    deploy: str | None = None

    def __post_init__(self):
        self.validate()
        object.__setattr__(self, "multiple_of", int(self.multiple_of))

    def validate(self) -> None:
        """Raise the constructor's errors for these values."""
        if not callable(self.score) and self.score not in SCORES:
            raise ValueError(f"unknown score {self.score!r}; allowed: {', '.join(SCORES)} or a callable")
        for name in ("compensate", "reconstruct"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"unknown allocation {self.allocation!r}; allowed: {', '.join(ALLOCATIONS)}")
        multiple = self.multiple_of
        if isinstance(multiple, bool) or not isinstance(multiple, Integral) or multiple < 1:
            raise ValueError(f"multiple_of must be an integer of at least 1, got {multiple!r}")
        if self.deploy is not None:
            consumer(self.deploy)

    @classmethod
    def parse(cls, text: str, *, multiple_of: int = 128) -> Recipe:
        """Read a recipe from its name, such as `hybrid+compensate`.

        Args:
            text: A score, then any of `+compensate`, `+sensitivity` (the allocation) and `+reconstruct`.
            multiple_of: See `Recipe`; it is not part of the name.

        Raises:
            ValueError: An unknown score or suffix.
        """
        score, *additions = text.split("+")
        allowed = ("compensate", "sensitivity", "reconstruct")
        if score not in SCORES or not set(additions) <= set(allowed) or len(set(additions)) < len(additions):
            raise ValueError(
                f"unknown recipe {text!r}: give a score ({', '.join(SCORES)}), followed by any of "
                + ", ".join(f"+{name}" for name in allowed)
            )
        return cls(
            score=score,
            compensate="compensate" in additions,
            allocation="sensitivity" if "sensitivity" in additions else "uniform",
            reconstruct="reconstruct" in additions,
            multiple_of=multiple_of,
        )

    def __str__(self) -> str:
        parts = [self.score_name]
        if self.compensate:
            parts.append("compensate")
        if self.allocation == "sensitivity":
            parts.append("sensitivity")
        if self.reconstruct:
            parts.append("reconstruct")
        return "+".join(parts)

    @property
    def score_name(self) -> str:
        """The name of the score, even if it is a callable."""
        return self.score if isinstance(self.score, str) else getattr(self.score, "__name__", type(self.score).__name__)

    @property
    def width_multiple(self) -> int:
        """The number of which widths are multiples: the least that fits both `multiple_of` and `deploy`."""
        if self.deploy is None:
            return self.multiple_of
        return math.lcm(self.multiple_of, consumer(self.deploy).multiple)

    @property
    def needs(self) -> Needs:
        """What the recipe needs besides the weights."""
        sensitivity = self.score == "surgeon" or self.allocation == "sensitivity"
        argument = ""
        if isinstance(self.score, str) and self.score in CALIBRATED_SCORES:
            argument = f"score={self.score!r}"
        elif self.compensate:
            argument = "compensate=True"
        elif self.allocation == "sensitivity":
            argument = "allocation='sensitivity'"
        return Needs(argument=argument, gram=self.compensate or sensitivity, sensitivity=sensitivity)

    def check_data(self, given: Sequence[str], missing: str) -> None:
        """Check that calibration data is given if, and only if, the recipe uses it.

        Args:
            given: The arguments that give calibration data, as the caller writes them.
            missing: What to give if it is needed, for the message.

        Raises:
            ValueError: It is needed and not given, or given and not used.
        """
        if self.needs.calibration and not given:
            raise ValueError(f"{self.needs.argument} needs {missing}")
        if given and not self.needs.calibration:
            scores = ", ".join(CALIBRATED_SCORES)
            raise ValueError(
                f"{' and '.join(given)} would be ignored: score={self.score_name!r} uses no calibration data."
                f" Remove it, or use one of the scores {scores}, compensate=True or allocation='sensitivity'"
            )

    def options(self) -> dict:
        """Return the recipe as keyword arguments of `prune` and `prune_checkpoint`."""
        return {
            "score": self.score,
            "compensate": self.compensate,
            "allocation": self.allocation,
            "multiple_of": self.multiple_of,
            "deploy": self.deploy,
        }
