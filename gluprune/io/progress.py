"""Progress: a bar in a terminal or notebook, and a plain line now and then where stderr is a log."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import auto, tqdm

SECONDS_PER_LINE = 30.0


class _Lines(tqdm):
    """A bar that prints a line to stderr every `SECONDS_PER_LINE`."""

    def __init__(self, iterable: Iterable | None = None, **options: Any):
        super().__init__(
            iterable,
            bar_format="{unit} {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} remaining",
            file=io.StringIO(),  # for what erases a bar
            mininterval=SECONDS_PER_LINE,
            maxinterval=SECONDS_PER_LINE,
            miniters=1,
            **options,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the state; nothing at the start, and nothing to erase at the end."""
        if self.n and msg is None:
            print(f"{self.desc.removesuffix(': ')}: {self}", file=sys.stderr, flush=True)


def progress(iterable: Iterable | None = None, *, desc: str, unit: str, **options: Any) -> tqdm:
    """Return a progress bar; in a log, it prints a line every `SECONDS_PER_LINE`.

    Args:
        iterable: What to go through. None: the caller calls `update`.
        desc: What is being done.
        unit: What is counted.
        **options: Others of `tqdm`, such as `total`.
    """
    kind: Any = _Lines
    if sys.stderr.isatty():
        kind = tqdm
    elif type(sys.stderr).__module__.startswith("ipykernel"):
        kind = auto.tqdm  # that of notebooks, with widgets, if they are installed
    return kind(iterable, desc=desc, unit=unit, leave=False, **options)


RESUMED = "continuing an interrupted run: the stages that it finished are not repeated"


def announce(stage: str) -> None:
    """Print a line that says which stage of a long run begins, to stderr; nothing where progress is disabled."""
    if os.environ.get("TQDM_DISABLE") != "1":
        print(stage, file=sys.stderr, flush=True)
