"""One frozen record for every measured figure, kept as JSON lines. Tables and plots are made from records, never typed."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

VERSIONED = (
    *("gluprune", "torch", "triton", "transformers", "lm-eval", "nvidia-ml-py"),
    *("optipfair", "liger-kernel", "flash-swiglu-mlp"),
)


def hardware() -> str:
    """The GPU, or the CPU as the system names it with the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = (
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        )
        name = next(names, name)
    return f"{name}, {torch.get_num_threads()} threads"


def driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    told = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", told.read_text()) if told.is_file() else None
    return found.group() if found else None


def versions() -> dict[str, str]:
    """Installed versions of the packages that a figure depends on, and of Python."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def commit() -> str | None:
    """The commit of the source tree, with "+" where it has uncommitted changes; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True)
class Record:
    """One figure: what was measured, on what, by whom, and its spread.

    what: name of the measurement; shape: its sizes; provider: who did the work.
    unit: of p20, p50, p80 and floor. The percentiles are None where the provider refused the shape.
    nbytes, flops: bytes that must be moved and operations that must be done, at the least.
    floor: the least p50 that the ceilings measured in the same run allow for them.
    method: how it was measured, where there is more than one way (energy, above all).
    refusal: the words in which the provider refused the shape.
    """

    what: str
    provider: str
    shape: dict[str, int | float | str]
    dtype: str
    unit: str
    p20: float | None
    p50: float | None
    p80: float | None
    repeats: int
    nbytes: int | None = None
    flops: int | None = None
    floor: float | None = None
    method: str | None = None
    refusal: str | None = None
    hardware: str = field(default_factory=hardware)
    driver: str | None = field(default_factory=driver)
    versions: dict[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=commit)
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def share_of_floor(self) -> float | None:
        """How near the figure comes to the least that is possible: 1 is there; None where either is not known."""
        return self.floor / self.p50 if self.floor and self.p50 else None

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is better: rates are, as their unit tells ("tokens/s"); times, joules and bytes are not."""
        return self.unit.endswith("/s")

    @property
    def key(self) -> tuple:
        """What two measurements of the same figure have in common."""
        shape = tuple(sorted(self.shape.items()))
        return self.what, self.provider, shape, self.dtype, self.unit, self.method, self.hardware

    @classmethod
    def of(
        cls,
        what: str,
        provider: str,
        shape: dict,
        dtype: torch.dtype,
        unit: str,
        values: Sequence[float],
        **details: int | float | str | None,
    ) -> Record:
        """The record of repeated measurements; `details` are the optional fields.

        Raises:
            ValueError: no value.
        """
        if not values:
            raise ValueError(f"{what} by {provider}: nothing was measured")
        deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [*values] * 9
        p20, p50, p80 = deciles[1], deciles[4], deciles[7]
        return cls(what, provider, dict(shape), _name(dtype), unit, p20, p50, p80, len(values), **details)

    @classmethod
    def refused(
        cls,
        what: str,
        provider: str,
        shape: dict,
        dtype: torch.dtype,
        unit: str,
        words: str,
        method: str | None = None,
    ) -> Record:
        """The record of a provider that does not take the shape, in its own words."""
        return cls(what, provider, dict(shape), _name(dtype), unit, None, None, None, 0, method=method, refusal=words)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def append(path: str | Path, record: Record) -> None:
    """Add one line to a file of records, which is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(dataclasses.asdict(record)) + "\n")


def read(path: str | Path) -> list[Record]:
    """The records of a file.

    Raises:
        ValueError: a line that is no record; the message names it.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(Record(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is no record: {error}") from error
    return records
