"""GGUF files, which llama.cpp's own converter writes.

The converter writes one width into the file's metadata. Where layers differ, gluprune writes the same tensors again,
under the architecture `deci`, whose metadata holds a width for each layer, and otherwise is that of `llama`. Source:
llama.cpp, src/models/deci.cpp.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gluprune.checkpoints.load_save import read_config
from gluprune.checkpoints.source import mlp_tensors, read_source_config
from gluprune.io.shards import read_checkpoint
from gluprune.models import nemotron_nas

CONVERTER, FILE = "convert_hf_to_gguf.py", "model.gguf"
# The architecture with a width for each layer, and the keys that it reads for each layer.
_BY_LAYER, _WIDTH = "deci", "feed_forward_length"
_PER_LAYER = (_WIDTH, "attention.head_count", "attention.head_count_kv")
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
    """Return the width of every layer and the hidden size of a checkpoint that can be written as GGUF.

    Raises:
        ValueError: It is corrupt, or its layers differ and llama.cpp has no architecture for that.
    """
    tensors = [tensor for shard in read_checkpoint(folder) for tensor in shard.tensors]
    config = read_source_config(folder, len(tensors))
    mlp_tensors(folder, tensors, config)
    if len(set(config.widths)) > 1:
        if reason := nemotron_nas.config_obstacle(read_config(folder)):
            raise ValueError(
                f"{folder} has layers of different widths, which llama.cpp reads for"
                f" {' and '.join(nemotron_nas.FAMILIES)}: it is {config.model_type}; {reason}"
            )
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"{folder} has layers of different widths: writing them needs `pip install gguf`")
    return config.widths, config.hidden_size


def write(folder: Path, converter: Path, output: Path) -> None:
    """Write a checkpoint that `convertible_rows` takes.

    Args:
        folder: The checkpoint.
        converter: llama.cpp's script.
        output: The file that is written.

    Raises:
        RuntimeError: The converter failed; the message holds the last line that it printed.
    """
    widths, _ = convertible_rows(folder)
    if len(set(widths)) == 1:
        convert(folder, converter, output)
        return
    converted = output.with_suffix(".converted")
    convert(folder, converter, converted)
    write_widths(converted, output, widths)
    converted.unlink()


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


def write_widths(source: Path, output: Path, widths: Sequence[int]) -> None:
    """Write a GGUF file of architecture `llama` again, with the same tensors and a width for each layer.

    Args:
        source: The file that the converter wrote.
        output: The file that is written.
        widths: Intermediate size of every layer.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    writer = GGUFWriter(output, _BY_LAYER, endianess=reader.endianess)
    for name, field in reader.fields.items():
        if name == "general.architecture" or name.startswith("GGUF."):  # the header, which the writer writes
            continue
        kind, *_, item = field.types * 2
        value, key = field.contents(), name.removeprefix("llama.")
        if key in _PER_LAYER:
            value = list(widths) if key == _WIDTH else [value] * len(widths)
            kind, item = GGUFValueType.ARRAY, kind
        new_name = name if key == name else f"{_BY_LAYER}.{key}"
        writer.add_key_value(new_name, value, kind, item if kind is GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantizations(rows: Sequence[int]) -> list[str]:
    """Return the formats in which llama-quantize stores tensors with rows of these lengths without falling back."""
    fitting = [name for name, block in _BLOCKS.items() if all(row % block == 0 for row in rows)]
    return [*fitting, "F16"]
