"""What `prune` did, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class PruneReport:
    """What `prune` did.

    Attributes:
        kept: Layer index -> int64 `[widths[layer]]`, the neurons that were kept, ascending.
        widths: Layer index -> number of neurons after pruning.
        intermediate_size: The requested width, rounded to `multiple_of`; the mean of all layers if they differ.
        original_intermediate_size: Neurons per pruned layer before pruning.
        hidden_size: H.
        parameters: Parameters of the whole model after pruning; tied weights count once.
        original_parameters: The same before pruning.
        score: Name of the score.
        multiple_of: Widths are multiples of this.
        deploy: Where the model will run; see `Recipe`. None if it was not said.
    """

    kept: dict[int, torch.Tensor] = field(repr=False)
    widths: dict[int, int]
    intermediate_size: int
    original_intermediate_size: int
    hidden_size: int
    parameters: int
    original_parameters: int
    score: str
    multiple_of: int
    deploy: str | None

    @property
    def expansion_ratio(self) -> float:
        """Intermediate size divided by hidden size after pruning."""
        return self.intermediate_size / self.hidden_size

    @property
    def pruning_ratio(self) -> float:
        """Share of the neurons that were removed."""
        return 1 - self.intermediate_size / self.original_intermediate_size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PruneReport) and other.to_dict() == self.to_dict()

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def to_dict(self) -> dict:
        """Return everything as plain numbers, strings and lists, ready for JSON."""
        return {
            "score": self.score,
            "multiple_of": self.multiple_of,
            "deploy": self.deploy,
            "intermediate_size": self.intermediate_size,
            "original_intermediate_size": self.original_intermediate_size,
            "widths": self.widths,
            "hidden_size": self.hidden_size,
            "expansion_ratio": self.expansion_ratio,
            "pruning_ratio": self.pruning_ratio,
            "parameters": self.parameters,
            "original_parameters": self.original_parameters,
            "kept": {layer: kept.tolist() for layer, kept in self.kept.items()},
        }

    def __repr__(self) -> str:
        narrowest, widest = min(self.widths.values()), max(self.widths.values())
        target = f"; multiples of {self.multiple_of} for {self.deploy}" if self.deploy else ""
        spread = "" if narrowest == widest else f" on average, {narrowest} to {widest} per layer"
        layers = f"{len(self.widths)} layer" + ("" if len(self.widths) == 1 else "s")
        return (
            f"{self.original_intermediate_size} -> {self.intermediate_size} neurons in {layers}"
            f"{spread} (expansion ratio {self.expansion_ratio:.2f}, {self.pruning_ratio:.1%} pruned,"
            f" score {self.score});"
            f" {self.original_parameters:,} -> {self.parameters:,} parameters{target}"
        )
