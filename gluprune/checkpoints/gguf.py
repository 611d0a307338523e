"""GGUF files, which llama.cpp's own converter writes; gluprune only calls it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gluprune.checkpoints.source import mlp_tensors, read_source_config
from gluprune.io.shards import read_checkpoint, read_json_object
from gluprune.models import nemotron_nas

CONVERTER, FILE = "convert_hf_to_gguf.py", "model.gguf"
# Values in one block along a row: QK_K, and QK8_0, QK5_0, QK4_0 in llama.cpp's ggml/src/ggml-common.h. Where rows are
# not multiples of it, llama-quantize falls back to a larger format (docs/deploying.md).
_BLOCKS = {"K-quants": 256, "Q8_0, Q5_0, Q4_0": 32}


def find_converter(path: str | Path | None) -> Path:
    """Return the path of llama.cpp's converter: the one given, or that on the PATH.

    Raises:
        ValueError: There is none.
    """
    found = shutil.which(CONVERTER) if path is None else path
    if found is None or not Path(found).is_file():
        looked = "on the PATH" if path is None else f"at {path}"
        raise ValueError(f"no {CONVERTER} {looked}: clone llama.cpp, and give the file as converter=")
    return Path(found)


def convertible_rows(folder: Path) -> tuple[list[int], int]:
    """Return the width of every layer and the hidden size of a checkpoint that llama.cpp's converter takes.

    Raises:
        ValueError: Its layers differ in a way that the converter does not read, or it is corrupt.
    """
    tensors = [tensor for shard in read_checkpoint(folder) for tensor in shard.tensors]
    raw = read_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if raw.get("model_type") == nemotron_nas.MODEL_TYPE:
        widths, hidden_size = nemotron_nas.block_widths(raw), raw["hidden_size"]
    else:
        config = read_source_config(folder, len(tensors))
        mlp_tensors(folder, tensors, config)
        widths, hidden_size = config.widths, config.hidden_size
        if len(set(widths)) > 1:
            raise ValueError(f"{folder} has layers of different widths: export it as nemotron-nas, then that as gguf")
    if len(set(widths)) > 1 and not nemotron_nas.fits_ffn_mult(widths):
        raise ValueError(f"{folder} has layers whose widths are not multiples of 256, which {CONVERTER} cannot read")
    return widths, hidden_size


def convert(folder: Path, converter: Path, output: Path) -> None:
    """Run the converter with this Python.

    Args:
        folder: The checkpoint.
        converter: The script.
        output: The file that it writes.

    Raises:
        RuntimeError: It failed; the message holds the last line that it printed.
    """
    command = [sys.executable, str(converter), str(folder), "--outfile", str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode or not output.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(
            f"{converter} failed with exit code {done.returncode}: {lines[-1] if lines else 'no message'}"
        )


def quantizations(rows: Sequence[int]) -> list[str]:
    """Return the formats in which llama-quantize stores tensors with rows of these lengths without falling back."""
    fitting = [name for name, block in _BLOCKS.items() if all(row % block == 0 for row in rows)]
    return [*fitting, "F16"]
