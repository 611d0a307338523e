"""Tables of tuned launches: `tuned/<gpu>.json`, written by `python -m csrc_triton.tools.tune`."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

from csrc_triton.launch.configs import Config, Launch, Problem
from csrc_triton.launch.paths import DOWN_CONFIGS, GATE_UP_CONFIGS, PATH_KINDS
from csrc_triton.layout import DTYPES

M_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TUNED_DIRECTORY = Path(__file__).parents[1] / "tuned"

Table = dict[Problem, Launch]  # the M of a key is one of M_BUCKETS


def m_bucket(M: int) -> int:
    """Return the smallest bucket that holds `M`, or the last one."""
    return next((bucket for bucket in M_BUCKETS if bucket >= M), M_BUCKETS[-1])


def table_path(gpu: str) -> Path:
    """Return `tuned/<gpu>.json` for a GPU's name as the driver reports it."""
    return TUNED_DIRECTORY / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def device_table(device: torch.device) -> Table | None:
    """Return the table of a CUDA device's model, or None."""
    return _device_table(device) if device.type == "cuda" else None


@functools.lru_cache
def _device_table(device: torch.device) -> Table | None:
    path = table_path(torch.cuda.get_device_name(device))
    return load_table(path) if path.exists() else None


def entry_to_dict(problem: Problem, launch: Launch) -> dict[str, object]:
    """Return one entry of a table as JSON."""
    return {
        "sm": problem.sm,
        "hidden": problem.H,
        "padded": problem.I_padded,
        "tokens": problem.M,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "path": launch.path,
        "gate_up": _config_to_dict(launch.gate_up),
        "down": _config_to_dict(launch.down),
    }


def entry_from_dict(entry: dict[str, Any]) -> tuple[Problem, Launch]:
    """Return the inverse of `entry_to_dict`. Raises KeyError, TypeError or ValueError for any other input."""
    problem = Problem(
        M=int(entry["tokens"]),
        H=int(entry["hidden"]),
        I_padded=int(entry["padded"]),
        dtype=DTYPES[entry["dtype"]],
        sm=int(entry["sm"]),
    )
    if problem.M not in M_BUCKETS:
        raise ValueError(f"tokens must be one of {M_BUCKETS}, got {problem.M}")
    gate_up = _config_from_dict(GATE_UP_CONFIGS, entry["gate_up"])
    down = _config_from_dict(DOWN_CONFIGS, entry["down"])
    launch = Launch(entry["path"], gate_up, down)
    gate_up_kinds, down_kind = PATH_KINDS[launch.path]
    if type(gate_up) not in gate_up_kinds or type(down) is not down_kind:
        raise ValueError(f"path {launch.path!r} cannot consist of {gate_up} and {down}")
    for config in (gate_up, down):
        if config is not None and not config.valid(problem):
            where = f"sm_{problem.sm}, H {problem.H}, padded width {problem.I_padded} and {problem.dtype}"
            raise ValueError(f"{config} is not valid for {where}")
    return problem, launch


def load_table(path: Path) -> Table:
    """Read a table written by `python -m csrc_triton.tools.tune`.

    Raises:
        ValueError: the file, which is named, is malformed.
    """
    try:
        entries = [entry_from_dict(entry) for entry in json.loads(path.read_text())["entries"]]
        table = dict(entries)
        if len(table) < len(entries):
            raise ValueError("two entries for one shape")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"malformed table {path}: {type(error).__name__}: {error}") from error
    return table


def _config_to_dict(config: Config | None) -> dict[str, object] | None:
    return None if config is None else {"kind": type(config).__name__, **vars(config)}


def _config_from_dict(kinds: dict[str, Any], fields: dict[str, Any] | None) -> Any:
    if fields is None:
        return None
    return kinds[fields["kind"]](**{name: value for name, value in fields.items() if name != "kind"})
