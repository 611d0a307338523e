"""How much memory this process can still take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import psutil

_OWN_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the bytes that are free on the machine, and within the limits of a container or a batch job."""
    return max(0, int(min([psutil.virtual_memory().available, *map(_left, _groups())])))


def _groups() -> Iterator[Path]:
    """Yield the folders of the control group (version 2) of this process and of the groups that it belongs to."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("0::/"):
            group = _GROUPS / line.removeprefix("0::/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(_GROUPS))


def _left(group: Path) -> float:
    """Return the bytes that a control group may still take; infinity if it has no limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return math.inf
    # The kernel drops copies of files that are not in use before it refuses memory.
    return math.inf if limit == "max" else int(limit) - int(used) + int(kept.get("inactive_file", 0))
