"""What `shrink` and `heal` measured and wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from gluprune.pruning.history import loss_ends


def _measured(tokens: int, length: int, texts: Sequence[str]) -> str:
    return f"perplexity on {tokens:,} tokens held apart, in windows of {length}: {', '.join(texts)}"


@dataclass(frozen=True)
class Point:
    """One measured width.

    Attributes:
        width: Neurons of each MLP; the mean if layers differ.
        perplexity: On the text held apart.
        bytes: Size of the weights on disk.
    """

    width: int
    perplexity: float
    bytes: int


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink` measured and wrote.

    Attributes:
        folder: The checkpoint.
        recipe: Name of the recipe.
        dense: The dense model.
        curve: All pruned models that were measured, from wide to narrow; the healed one is the last.
        chosen: The one that was written.
        max_loss: The allowed rise of perplexity, if one was given.
        texts: Names of the texts that perplexity was measured on.
        tokens: Number of tokens that it was measured on.
        length: Tokens per window.
        picture: The picture; None without matplotlib.
        heal_tokens: On about how many tokens it was healed. 0: it was not.
    """

    folder: str
    recipe: str
    dense: Point
    curve: list[Point]
    chosen: Point
    max_loss: float | None
    texts: list[str]
    tokens: int
    length: int
    picture: str | None
    heal_tokens: int = 0

    @property
    def loss(self) -> float:
        """The rise of perplexity, as a share of the dense model's."""
        return self.chosen.perplexity / self.dense.perplexity - 1

    @property
    def points(self) -> Sequence[Point]:
        """The dense model and all of `curve`."""
        return [self.dense, *self.curve]

    def to_dict(self) -> dict:
        """Return everything as plain numbers, strings and lists, ready for JSON."""
        return {**asdict(self), "loss": self.loss}

    def __repr__(self) -> str:
        lines = [f"{'width':>7}{'removed':>9}{'MB':>9}{'perplexity':>12}{'vs dense':>10}"]
        for point in self.points:
            removed = "dense" if point is self.dense else f"{1 - point.width / self.dense.width:.1%}"
            times = f"{point.perplexity / self.dense.perplexity:.3f}×"
            lines.append(
                f"{point.width:>7}{removed:>9}{point.bytes / 1e6:>9.1f}{point.perplexity:>12.2f}{times:>10}"
                + (("  <- healed, written" if self.heal_tokens else "  <- written") if point == self.chosen else "")
            )
        lines += ["", _measured(self.tokens, self.length, self.texts), f"{self.folder}: {self.recipe}"]
        return "\n".join(lines + ([f"{self.picture}: the picture"] if self.picture else []))


@dataclass(frozen=True)
class HealReport:
    """What `heal` measured and wrote.

    Attributes:
        folder: The checkpoint.
        train: What was trained.
        tokens: On how many tokens.
        losses: The loss of every step.
        dense: Perplexity of the dense model on the text held apart.
        pruned: That of the model before training.
        healed: That of the model that was written.
        texts: Names of the texts that perplexity was measured on.
        test_tokens: Number of tokens that it was measured on.
        length: Tokens per window.
        memory: Bytes per process that the training takes, estimated.
    """

    folder: str
    train: str
    tokens: int
    losses: list[float]
    dense: float
    pruned: float
    healed: float
    texts: list[str]
    test_tokens: int
    length: int
    memory: int

    def to_dict(self) -> dict:
        """Return everything as plain numbers, strings and lists, ready for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        lines = [f"{'':>7}{'perplexity':>12}{'vs dense':>10}"]
        for name in ("dense", "pruned", "healed"):
            value = getattr(self, name)
            times = f"{value / self.dense:.3f}×"
            lines.append(f"{name:>7}{value:>12.2f}{times:>10}")
        loss = loss_ends(self.losses)
        count = f"{len(self.losses)} step" + ("s" if len(self.losses) > 1 else "")
        lines += [
            "",
            f"trained on {self.tokens:,} tokens in {count}; mean loss {loss['first']:.4f} in the first"
            f" tenth, {loss['last']:.4f} in the last",
            _measured(self.test_tokens, self.length, self.texts),
            f"{self.folder}: healed ({self.train})",
        ]
        return "\n".join(lines)
