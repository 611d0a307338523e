"""The command `python -m csrc_triton.tools.aot`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from csrc_triton.launch.device import SHARED_MEMORY
from csrc_triton.layout import DTYPES
from csrc_triton.tools.aot.check import check, shipped_calls
from csrc_triton.tools.aot.compile import cache_folder
from csrc_triton.tools.aot.table import record, summary, table

HIDDEN_SIZES = (2048, 3072)  # Llama-3.2-1B and 3B
INTERMEDIATE_SIZES = (8192, 7373, 6554, 5735, 4916, 4096, 3277)  # 0, 10 ... 60 % pruned


def triton_folder(version: str) -> Path:
    """Return a folder with that version of Triton, installed on first use."""
    folder = cache_folder() / f"triton-{version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{partial}/triton"]
            if subprocess.run([*command, f"triton=={version}"], check=False).returncode:
                raise RuntimeError(f"pip could not install triton=={version}")
            shutil.move(f"{partial}/triton", folder)
    return folder


def rows_under(version: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Return the rows of this command under another version of Triton, run in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.jsonl"
        paths = [str(triton_folder(version)), str(Path(__file__).parents[3])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "csrc_triton.tools.aot", *arguments, "--record", str(output)]
        subprocess.run(command, check=False, env=environment, stdout=subprocess.DEVNULL)
        if not output.exists():
            raise RuntimeError(f"the check under Triton {version} did not finish")
        return [json.loads(line) for line in output.read_text().splitlines()]


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows for the options of the command."""
    rows: list[dict[str, Any]] = []
    if options.triton:
        arguments = ["--dtype", options.dtype]
        for name in ("sm", "hidden", "intermediate"):
            arguments += [f"--{name}", *map(str, getattr(options, name))]
        for version in options.triton:
            rows += rows_under(version, arguments)
    else:
        for sm in options.sm:
            sizes = [(H, I) for H in options.hidden for I in options.intermediate]
            calls = [call for H, I in sizes for call in shipped_calls(sm, DTYPES[options.dtype], H, I)]
            rows += [{"dtype": options.dtype, **row} for row in check(calls, sm, progress=True)]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m csrc_triton.tools.aot", description="Compile every kernel without a GPU."
    )
    parser.add_argument("--sm", type=int, nargs="+", default=sorted(SHARED_MEMORY), choices=sorted(SHARED_MEMORY))
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN_SIZES, metavar="H")
    parser.add_argument("--intermediate", type=int, nargs="+", default=INTERMEDIATE_SIZES, metavar="I")
    parser.add_argument(
        "--triton", nargs="+", metavar="VERSION", help="check under these versions instead of the installed one"
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="PATH",
        help="write the rows as JSON lines, and as a table to the .md file of that name",
    )
    options = parser.parse_args(argv)
    try:
        rows = collect(options)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows, markdown=False))
    for version in dict.fromkeys(row["triton"] for row in rows):
        print(summary([row for row in rows if row["triton"] == version]))
    if options.record:
        record(rows, options.record)
    return 1 if any(row["failures"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
