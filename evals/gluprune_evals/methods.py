"""The methods of pruning whose quality is measured: recipes, and the text that each uses."""

from __future__ import annotations

from dataclasses import dataclass

from gluprune.pruning.recipe import Recipe


@dataclass(frozen=True)
class Method:
    """A recipe, and the text that it uses.

    Attributes:
        recipe: How the model is pruned, at exact widths.
        windows: Windows of the text to calibrate on. 0: none.
        text: "given", the calibration text; "own", text that the model wrote; "both".
        reconstruction: Windows of each text that `reconstruct` uses. 0: it is not run.
    """

    recipe: Recipe
    windows: int = 0
    text: str = "given"
    reconstruction: int = 0

    @classmethod
    def parse(cls, name: str, windows: int = 0, *, text: str = "given", reconstruction: int = 0) -> Method:
        """Return the method for a recipe's name."""
        return cls(Recipe.parse(name, multiple_of=1), windows, text, reconstruction)


# The labels are the names in the records.
METHODS = {
    "surgeon by layer, reconstructed on more, + own text": Method.parse(
        "surgeon+compensate+sensitivity+reconstruct", 128, text="both", reconstruction=64
    ),
    "surgeon, reconstructed on more, + own text": Method.parse(
        "surgeon+compensate+reconstruct", 128, text="both", reconstruction=64
    ),
    "surgeon by layer, reconstructed, + own text": Method.parse(
        "surgeon+compensate+sensitivity+reconstruct", 128, text="both", reconstruction=16
    ),
    "surgeon, reconstructed, + own text": Method.parse(
        "surgeon+compensate+reconstruct", 128, text="both", reconstruction=16
    ),
    "surgeon, reconstructed, own text only": Method.parse(
        "surgeon+compensate+reconstruct", 128, text="own", reconstruction=16
    ),
    "surgeon by layer, reconstructed": Method.parse(
        "surgeon+compensate+sensitivity+reconstruct", 128, reconstruction=10
    ),
    "surgeon by layer, re-solved, + own text": Method.parse("surgeon+compensate+sensitivity", 128, text="both"),
    "surgeon, re-solved, + own text": Method.parse("surgeon+compensate", 128, text="both"),
    "surgeon, re-solved": Method.parse("surgeon+compensate", 128),
    "hybrid, re-solved, + own text": Method.parse("hybrid+compensate", 128, text="both"),
    "hybrid, re-solved": Method.parse("hybrid+compensate", 128),
    "MAW": Method.parse("maw"),
    "hybrid": Method.parse("hybrid", 128),
    "MAW gate+up+down": Method.parse("maw_gud"),
    "activation, re-solved": Method.parse("activation+compensate", 128),
    "MAW, re-solved": Method.parse("maw+compensate", 128),
}
