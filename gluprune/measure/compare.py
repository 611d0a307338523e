"""Two runs of the same measurements: which figures got worse by more than their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gluprune.measure.records import Record


@dataclass(frozen=True)
class Change:
    """One figure in two runs.

    Attributes:
        old: Its record in the first run.
        new: Its record in the second run.
    """

    old: Record
    new: Record

    @property
    def verdict(self) -> str:
        """How the figure changed.

        "worse" and "better" where the ranges from p20 to p80 do not overlap; "same" where they do; "no spread" where
        one of the two was measured only once; "missing" and "no longer missing" where only one run has the figure.
        """
        if self.new.p50 is None:
            return "same" if self.old.p50 is None else "missing"
        if self.old.p50 is None:
            return "no longer missing"
        if min(self.old.repeats, self.new.repeats) < 2:
            return "no spread"
        if self.new.p20 > self.old.p80:
            return "better" if self.new.higher_is_better else "worse"
        if self.new.p80 < self.old.p20:
            return "worse" if self.new.higher_is_better else "better"
        return "same"

    @property
    def is_regression(self) -> bool:
        """Whether the figure is worse or missing."""
        return self.verdict in ("worse", "missing")

    def __str__(self) -> str:
        shape = ", ".join(f"{key} {value}" for key, value in self.new.shape.items())
        name = f"{self.new.what}, {self.new.provider}, {shape}, {self.new.dtype}"
        if self.new.p50 is None or self.old.p50 is None:
            return f"{self.verdict}: {name}: {self.new.refusal or self.old.refusal}"
        figures = f"{self.old.p50:.4g} -> {self.new.p50:.4g} {self.new.unit} ({self.new.p50 / self.old.p50 - 1:+.1%})"
        return f"{self.verdict}: {name}: {figures}"


@dataclass(frozen=True)
class Comparison:
    """The changes in the figures that two runs share, and how many figures only one of them has."""

    changes: list[Change]
    only_old: int
    only_new: int

    @property
    def regressions(self) -> list[Change]:
        """The figures that got worse."""
        return [change for change in self.changes if change.is_regression]

    def to_dict(self) -> dict:
        """Return plain data."""
        lines = [
            {
                "verdict": change.verdict,
                "old": change.old.p50,
                "new": change.new.p50,
                "unit": change.new.unit,
                **_place(change.new),
            }
            for change in self.changes
        ]
        return {"changes": lines, "only_old": self.only_old, "only_new": self.only_new}

    def __str__(self) -> str:
        counts = {}
        for change in self.changes:
            counts[change.verdict] = counts.get(change.verdict, 0) + 1
        lines = [str(change) for change in self.changes if change.verdict not in ("same", "no spread")]
        summary = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        return "\n".join(
            [*lines, f"{summary}; {self.only_old} only in the old run, {self.only_new} only in the new one"]
        )


def _place(record: Record) -> dict:
    return {"what": record.what, "provider": record.provider, "shape": record.shape, "dtype": record.dtype}


def compare(old: Sequence[Record], new: Sequence[Record]) -> Comparison:
    """Compare the figures of the same measurement, provider, shape, dtype, unit, method and hardware.

    Raises:
        ValueError: The runs have no figure in common.
    """
    before, after = ({record.key: record for record in records} for records in (old, new))
    common = [key for key in after if key in before]
    if not common:
        raise ValueError("the two runs have no figure in common: same measurement, provider, shape, dtype and hardware")
    changes = [Change(before[key], after[key]) for key in common]
    return Comparison(changes, len(before) - len(common), len(after) - len(common))
