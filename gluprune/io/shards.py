"""Safetensors files on disk: headers and indexes, checked before any data is used.

A file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, data_offsets) and the raw data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# A header takes about 100 bytes per tensor. The format allows 100 MB, which could take 2 GB of memory when parsed as
# JSON; no model that can be pruned comes near 16 MiB.
MAX_JSON_BYTES = 1 << 24

MAX_NAME_LENGTH = 1024

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard.

    Attributes:
        file: The shard.
        name: Name of the tensor.
        dtype: As the format names it, a key of `DTYPES`.
        shape: Sizes of the dimensions.
        offset: Position of the data, in bytes from the beginning of the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.itemsize

    def read(self, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Fill contiguous tensors with the stored bytes in order; yield each when it is full.

        Raises:
            ValueError: The file ends before.
        """
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for block in blocks:
                rest = block.reshape(-1).view(torch.uint8).numpy().data
                while rest.nbytes:
                    count = file.readinto(rest)
                    if not count:
                        raise ValueError(f"{self.file} ends within tensor {self.name!r}")
                    rest = rest[count:]
                yield block

    def first_row(self) -> torch.Tensor:
        """Read the first row of a matrix, `[1, columns]`; for errors see `read`."""
        (row,) = self.read([torch.empty(1, self.shape[1], dtype=DTYPES[self.dtype])])
        return row


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their data, and its free-form metadata."""

    file: Path
    tensors: list[StoredTensor]
    metadata: dict[str, str]


def _unique(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def parse_json_object(text: bytes, what: str) -> dict:
    """Parse a JSON object from untrusted bytes.

    Raises:
        ValueError: They are not a JSON object; the message begins with `what` and says why.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\ud" in text.lower():  # JSON can hold halves of surrogate pairs, which UTF-8 cannot encode
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError(f"{what} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object, found {type(value).__name__}")
    return value


def read_json_object(path: Path) -> dict:
    """Read the JSON object in a file of at most `MAX_JSON_BYTES`.

    Raises:
        ValueError: The file is too large or does not hold a JSON object; the message names it.
        OSError: It cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than the maximum of {MAX_JSON_BYTES:,}")
    return parse_json_object(path.read_bytes(), str(path))


def _short(value: object) -> str:
    """Return a value from a corrupt file, shortened to fit into an error message."""
    return repr(value)[:80] if isinstance(value, (str, int, float)) else type(value).__name__


def _are_counts(value: object, at_most: int) -> bool:
    """Whether a value is a list of at most `at_most` sizes or positions, none too large for fast arithmetic."""
    return (
        isinstance(value, list)
        and len(value) <= at_most
        and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value)
    )


def _parse_tensor(file: Path, name: str, entry: object, data_start: int) -> tuple[StoredTensor, int]:
    """Return the tensor of a header entry, and the end of its data from the beginning of the file."""
    what = f"{file}: tensor {_short(name)}"
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"{what} must have a name of up to {MAX_NAME_LENGTH} characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} has unknown dtype {_short(dtype)}: known are {', '.join(DTYPES)}")
    if not _are_counts(shape, at_most=8):
        raise ValueError(f"{what} must have a shape of up to 8 sizes")
    if not _are_counts(offsets, at_most=2) or len(offsets) != 2:
        raise ValueError(f"{what} must have two data_offsets")
    begin, end = offsets
    tensor = StoredTensor(file, name, dtype, tuple(shape), data_start + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{what} spans {end - begin} bytes, but {dtype} {shape} takes {tensor.nbytes}")
    return tensor, data_start + end


def read_shard(file: Path) -> Shard:
    """Read the header of a safetensors file, and check it against the size of the file.

    Raises:
        ValueError: The file is truncated or corrupt; the message names the file and says what is wrong.
        OSError: It cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length_bytes = stream.read(8)
        if len(length_bytes) < 8:
            raise ValueError(f"{file} is truncated: {size} bytes, too short for a safetensors file")
        length = int.from_bytes(length_bytes, "little")
        if length > size - 8:
            raise ValueError(f"{file} is truncated or corrupt: a header of {length:,} bytes in a file of {size:,}")
        if length > MAX_JSON_BYTES:
            raise ValueError(f"{file} has a header of {length:,} bytes: at most {MAX_JSON_BYTES:,} are expected")
        text = stream.read(length)
    if not text.startswith(b"{"):
        raise ValueError(f"the header of {file} must begin with a brace, found {text[:8]!r}")
    header = parse_json_object(text, f"the header of {file}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: __metadata__ must map strings to strings")

    data_start = 8 + length
    spans = sorted(
        (_parse_tensor(file, name, entry, data_start) for name, entry in header.items()),
        key=lambda span: (span[0].offset, span[1]),
    )
    position = data_start
    for tensor, end in spans:
        if tensor.offset != position:
            what = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise ValueError(f"{file}: tensor {_short(tensor.name)} {what} (byte {tensor.offset}, expected {position})")
        position = end
    if position != size:
        what = "is truncated" if position > size else "has bytes after its data"
        raise ValueError(f"{file} {what}: {size:,} bytes, its header describes {position:,}")
    return Shard(file, [tensor for tensor, _ in spans], metadata)


def read_checkpoint(folder: Path) -> list[Shard]:
    """Return the shards of a checkpoint: `model.safetensors`, or the files that the index names, each tensor once.

    Raises:
        ValueError: There are no safetensors, a file is corrupt, or index and files contradict each other.
        OSError: A file is missing or cannot be read.
    """
    if (folder / SINGLE_FILE).is_file():
        return [read_shard(folder / SINGLE_FILE)]
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        wanted = f"neither {SINGLE_FILE} nor {INDEX_FILE}"
        raise ValueError(f"{folder} holds {wanted}: only safetensors checkpoints can be pruned")
    weight_map = read_json_object(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_file} has no weight_map from tensors to files")
    for name, file in weight_map.items():
        # The output uses the same name, so it must not lead out of the folder.
        is_plain = isinstance(file, str) and file == Path(file).name and file.isprintable()
        if not is_plain or not file.endswith(".safetensors"):
            place = f"tensor {_short(name)} into {_short(file)}"
            raise ValueError(f"{index_file} puts {place}, not the name of a safetensors file")

    shards = [read_shard(folder / file) for file in sorted(set(weight_map.values()))]
    for shard in shards:
        for tensor in shard.tensors:
            if weight_map.get(tensor.name) != shard.file.name:
                label = f"tensor {_short(tensor.name)}"
                raise ValueError(f"{shard.file} holds {label}, which {index_file} does not put there")
    stored = {tensor.name for shard in shards for tensor in shard.tensors}
    for name, file in weight_map.items():
        if name not in stored:
            raise ValueError(f"{index_file} names tensor {_short(name)}, which {folder / file} does not hold")
    return shards


def encode_header(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Return header length and header of a file that holds these tensors (name, dtype, shape) back to back."""
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
