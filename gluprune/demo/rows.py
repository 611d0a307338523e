"""What the demonstration shows: its recipes, and one row for each configuration."""

from __future__ import annotations

from dataclasses import dataclass

# Scored by hybrid: `surgeon` is slightly better, but its sensitivities would take half of the demo's time.
PAPER, DEFAULT, RECOMMENDED = "maw", "maw_gud", "hybrid+compensate+reconstruct"
RECIPES = {
    PAPER: "the paper's criterion (MAW of gate and up)",
    DEFAULT: "gluprune's default, needs no text (MAW of gate, up and down)",
    RECOMMENDED: "the best with a short calibration (hybrid, compensated, reconstructed)",
}
QUESTION = "Name three things that live in the sea."


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        recipe: Name of the recipe, or "dense".
        ratio: Share of the neurons to remove, before the width is rounded to a multiple of 128.
        intermediate_size: Neurons of each MLP.
        expansion_ratio: Intermediate size divided by hidden size.
        parameters: Number of parameters of the whole model.
        bytes: Size of all weights of the checkpoint.
        perplexity: On the demo's text.
        sample: The beginning of the answer to `QUESTION`.
        prefill_tokens_per_second: Best of several rounds at batch 1; depends on the width only.
        decode_tokens_per_second: As above.
    """

    recipe: str
    ratio: float
    intermediate_size: int
    expansion_ratio: float
    parameters: int
    bytes: int
    perplexity: float
    sample: str
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
