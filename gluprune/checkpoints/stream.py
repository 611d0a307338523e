"""Prune a checkpoint on the disk, tensor by tensor, without building the model: memory for one layer's MLP is enough.

The shards are copied one after the other, block by block, and MLP tensors are narrowed on the way. A layer is scored
when the first of its tensors is due. What comes out equals pruning in memory and saving. Scores that need calibration
data, and the re-solved down projection, take it from the file of a pass that was made before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from gluprune.calibration.statistics import LayerStatistics, Statistics
from gluprune.io import atomic
from gluprune.io.atomic import check_destination, complete_folder
from gluprune.io.shards import DTYPES, INDEX_FILE, Shard, StoredTensor, encode_header, read_checkpoint, read_json_object
from gluprune.models.families import Family, family_of_type
from gluprune.pruning.compensate import resolved_down
from gluprune.pruning.narrow import width_entries
from gluprune.pruning.prune import (
    PruneReport,
    allocated_widths,
    check_layers,
    check_statistics,
    needs_sensitivity,
    score_layer,
    what_needs_calibration,
)
from gluprune.pruning.scores import CALIBRATED_SCORES, STATIC_SCORES, static_score
from gluprune.pruning.widths import select, target_width

# What a Hub download takes: safetensors, JSON and tokenizer files, without the other formats in some repositories.
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "tokenizer*"]
_NOT_DOWNLOADED = ["consolidated*", "original/*", "onnx/*"]

# Weights of other formats (some are pickles) would contradict the pruned ones, as would the width in params.json.
_OTHER_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".distcp", ".nemo", ".npy", ".npz"),
    *(".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", ".llamafile"),
}
_OTHER_DESCRIPTIONS = ("params.json", ".index.json")

_PRUNABLE_DTYPES = ("BF16", "F16", "F32", "F64")
_MLP_TENSOR = re.compile(r"(?P<prefix>(?:.*?\.)?)layers\.(?P<layer>0|[1-9][0-9]{0,5})\.mlp\.(?P<name>.+)", re.DOTALL)
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bf16, and moving needs no arithmetic
_SELECTIONS = "selections"

# Bytes read at a time: many enough to make little of the calls, few enough to stay in a core's cache until written.
_BLOCK_BYTES = 1 << 21


@dataclass(frozen=True)
class CheckpointReport(PruneReport):
    """What `prune_checkpoint` did, or with `dry_run` would do (`kept` is empty then).

    files: name -> size in bytes, for every file of the output.
    skipped: files of the source that the output goes without: other weight formats and hidden files.
    """

    files: dict[str, int]
    skipped: list[str]

    @property
    def layers(self) -> list[int]:
        """Indices of the pruned layers."""
        return list(self.widths)

    def to_dict(self) -> dict:
        return {**super().to_dict(), "layers": self.layers, "files": self.files, "skipped": self.skipped}

    def __str__(self) -> str:
        text = f"{super().__str__()}; {len(self.files)} files of {sum(self.files.values()):,} bytes"
        return text + (f"; left out: {', '.join(self.skipped)}" if self.skipped else "")


def _view(buffer: torch.Tensor, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """The beginning of a uint8 buffer as a tensor."""
    return buffer[: math.prod(shape) * DTYPES[dtype].itemsize].view(DTYPES[dtype]).view(shape)


def _read(tensor: StoredTensor, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Fill contiguous tensors with the stored bytes, one block after the other; each comes out when it is full."""
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        for block in blocks:
            rest = memoryview(block.reshape(-1).view(torch.uint8).numpy())
            while rest.nbytes:
                count = file.readinto(rest)
                if not count:
                    raise ValueError(f"{tensor.file} ends within tensor {tensor.name!r}")
                rest = rest[count:]
            yield block


def _reads_down(score: str) -> bool:
    """Whether a score depends on the down projection: if so, NaN there comes through."""
    if score in CALIBRATED_SCORES:
        return True
    ones = torch.ones(1, 2)
    return bool(static_score(score, ones, ones, torch.full((2, 1), math.nan)).isnan())


@dataclass(frozen=True)
class _OutputTensor:
    """One tensor of the output: where it comes from, and the layer whose neurons it loses along `dim` (None: none).

    resolved: it is a down projection to be solved anew for the neurons that stay.
    """

    stored: StoredTensor
    shape: tuple[int, ...]
    layer: int | None = None
    dim: int = 0
    resolved: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.stored.itemsize

    def blocks(self, selector: _Selector) -> Iterator[np.ndarray]:
        """The data in order, block by block."""
        stored = self.stored
        if self.layer is None:
            sizes = (min(_BLOCK_BYTES, stored.nbytes - start) for start in range(0, stored.nbytes, _BLOCK_BYTES))
            for block in _read(stored, (torch.empty(size, dtype=torch.uint8) for size in sizes)):
                yield block.numpy()
            return
        if self.resolved:
            weight = selector.resolved_down(self.layer, stored)
            block_rows = max(1, _BLOCK_BYTES // (weight.shape[1] * stored.itemsize))
            yield from (rows.view(_SAME_SIZE[stored.itemsize]).numpy() for rows in weight.split(block_rows))
            return

        kept = selector.kept_by(self.layer).numpy()
        # A packed projection holds two runs of I entries, each of which keeps the same neurons.
        runs = self.shape[self.dim] // len(kept)
        run_length = stored.shape[self.dim] // runs
        indices = np.concatenate([kept + run * run_length for run in range(runs)])
        rows, row_bytes = stored.shape[0], stored.nbytes // stored.shape[0]
        block_rows = max(1, _BLOCK_BYTES // row_bytes)
        starts = range(0, rows, block_rows)
        if (held := selector.held.get(stored.name)) is not None:
            blocks = iter(held.split(block_rows))
        else:
            buffer = torch.empty(min(block_rows, rows) * row_bytes, dtype=torch.uint8)
            shapes = ((min(block_rows, rows - start), *stored.shape[1:]) for start in starts)
            blocks = _read(stored, (_view(buffer, stored.dtype, shape) for shape in shapes))
        for block, start in zip(blocks, starts):
            # numpy's take is twice as fast as torch's indexing here, and leaves the other cores to the writing thread.
            entries = block.view(_SAME_SIZE[stored.itemsize]).numpy()
            if self.dim == 1:
                yield entries.take(indices, axis=1)
            else:
                first, last = np.searchsorted(indices, (start, start + len(block)))
                yield entries.take(indices[first:last] - start, axis=0)


@dataclass(frozen=True)
class _OutputShard:
    name: str
    header: bytes
    tensors: list[_OutputTensor]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def is_finished(self, folder: Path) -> bool:
        """Whether the file is there. Only a whole file has its final name; size and header keep strangers out."""
        path = folder / self.name
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        with open(path, "rb") as file:
            return file.read(len(self.header)) == self.header

    def chunks(self, selector: _Selector) -> Iterator[bytes | memoryview]:
        """The bytes of the file in order."""
        yield self.header
        for tensor in self.tensors:
            for block in tensor.blocks(selector):
                yield block.reshape(-1).view(np.uint8).data


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before the first weight is read.

    mlps: the MLP tensors of every layer.
    statistics: the file of the calibration pass, if one is looked at.
    compensate: whether down projections are solved anew.
    shards, documents, copied: the output: shards, JSON files by name, and files taken over from the source.
    key: names the source in its present state together with what is to be done to it.
    """

    folder: Path
    family: Family
    mlps: list[dict[str, StoredTensor]]
    statistics: Path | None
    compensate: bool
    shards: list[_OutputShard]
    documents: dict[str, bytes]
    copied: list[str]
    key: str
    report: CheckpointReport


def _mlp_tensors(folder: Path, tensors: list[StoredTensor], family: Family) -> list[dict[str, StoredTensor]]:
    """The MLP tensors of every decoder layer, by their name inside the MLP.

    Raises:
        ValueError: a tensor is unknown or doubtful, or a layer is missing; the message names it.
    """
    projections = {family.gate, family.up, family.down}
    layers: dict[int, dict[str, StoredTensor]] = {}
    prefixes: dict[str, StoredTensor] = {}
    for tensor in tensors:
        match = _MLP_TENSOR.fullmatch(tensor.name)
        if match is None:
            continue
        projection, _, kind = match["name"].partition(".")
        if projection not in projections or kind not in ("weight", "bias"):
            raise ValueError(
                f"{tensor.file}: tensor {tensor.name!r} does not belong to a plain {family.mlp_class}:"
                " quantized or adapted projections cannot be pruned"
            )
        prefixes[match["prefix"]] = tensor
        layers.setdefault(int(match["layer"]), {})[match["name"]] = tensor
    if len(prefixes) > 1:
        examples = ", ".join(repr(tensor.name) for tensor in prefixes.values())
        raise ValueError(f"{folder} holds several stacks of layers: {examples}")
    for index in range(len(layers)):
        if index not in layers:
            raise ValueError(f"{folder}: layer {max(layers)} has MLP tensors, but layer {index} has none")
    return [layers[index] for index in range(len(layers))]


def _check_mlp(
    folder: Path, layer: int, tensors: dict[str, StoredTensor], family: Family, hidden_size: int, width: int
) -> None:
    """Every projection is there, with the shape that the config gives it."""
    rows = 2 * width if family.packed else width
    expected = {family.gate: (rows, hidden_size), family.up: (rows, hidden_size), family.down: (hidden_size, width)}
    for projection in expected:
        if f"{projection}.weight" not in tensors:
            raise ValueError(f"{folder}: layer {layer} has no tensor mlp.{projection}.weight")
    for name, tensor in tensors.items():
        projection, _, kind = name.partition(".")
        shape = expected[projection] if kind == "weight" else expected[projection][:1]
        label = f"{tensor.file}: tensor {tensor.name!r}"
        if tensor.shape != shape or not tensor.nbytes:
            raise ValueError(f"{label} has shape {list(tensor.shape)}, the config says {list(shape)}")
        if tensor.dtype not in _PRUNABLE_DTYPES:
            raise ValueError(f"{label} has dtype {tensor.dtype}: allowed are {', '.join(_PRUNABLE_DTYPES)}")


def _plan_shard(shard: Shard, pruned: dict[str, _OutputTensor]) -> _OutputShard:
    # Widest type first, as the format's own writer does, so that every tensor begins at a multiple of its element size.
    stored = sorted(shard.tensors, key=lambda tensor: -tensor.itemsize)
    tensors = [pruned.get(tensor.name, _OutputTensor(tensor, tensor.shape)) for tensor in stored]
    header = encode_header(
        [(tensor.stored.name, tensor.stored.dtype, tensor.shape) for tensor in tensors],
        {**shard.metadata, "format": "pt"},
    )
    return _OutputShard(shard.file.name, header, tensors)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass(frozen=True)
class _Config:
    """What is asked of a model's config.

    widths: intermediate size of every layer.
    tied: whether the head is the embedding.
    """

    family: Family
    hidden_size: int
    widths: list[int]
    tied: bool


# The JSON types of what `_Config` is made from.
_CONFIG_ENTRIES = {"hidden_size": int, "intermediate_size": int, "num_hidden_layers": int, "tie_word_embeddings": bool}


def _read_config(folder: Path, tensor_count: int) -> tuple[dict, _Config]:
    """The config as the JSON that it is, and what it says.

    Raises:
        ValueError: it is missing or unusable, of a composite model, or names more layers than there are tensors.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json")
    raw = read_json_object(file)
    # Before transformers sees the number: some configs build a list of that length.
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 < layers <= tensor_count:
        told = f"num_hidden_layers={str(layers)[:40]}"
        raise ValueError(f"{file} says {told}, the checkpoint holds {tensor_count} tensors")
    if "text_config" in raw:
        raise ValueError(f"{file}: model type {raw.get('model_type')!r} is composite: only text models can be pruned")
    is_plain = all(type(raw.get(key)) is kind for key, kind in _CONFIG_ENTRIES.items())
    if isinstance(raw.get("model_type"), str) and is_plain and raw.get("per_layer_config") is None:
        family = family_of_type(raw["model_type"])
        widths = [raw["intermediate_size"]] * layers
        return raw, _Config(family, raw["hidden_size"], widths, raw["tie_word_embeddings"])

    # Where the JSON leaves defaults to transformers, or layers differ. Importing it takes as long as importing torch.
    from gluprune.checkpoints.load_save import layer_widths, read_config

    try:
        config = read_config(folder)
    except Exception as error:  # a corrupt config can make transformers raise anything
        raise ValueError(f"{file} is no usable config: {_first_line(error)}") from error
    family = family_of_type(config.model_type)
    return raw, _Config(family, config.hidden_size, layer_widths(config), config.tie_word_embeddings)


def _pruned_config(raw: dict, widths: list[int]) -> dict:
    """The source's config with new widths and otherwise as it is, so that it loads wherever the source loads."""
    entries = {**raw, **width_entries(widths)}
    return {key: value for key, value in entries.items() if key != "per_layer_config" or value is not None}


def _other_files(folder: Path, written: set[str]) -> tuple[list[str], list[str]]:
    """What else belongs to the checkpoint, and what is left out; paths relative to the folder."""
    copied, skipped = [], []
    for root, folders, names in os.walk(folder):
        here = Path(root).relative_to(folder)
        skipped += [f"{here / name}/" for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (here / name for name in sorted(names)):
            if str(path) in written:
                continue
            is_foreign = path.suffix.lower() in _OTHER_WEIGHTS or path.name.endswith(_OTHER_DESCRIPTIONS)
            is_hidden = path.name.startswith(".")
            belongs = not is_foreign and not is_hidden and (folder / path).is_file()
            (copied if belongs else skipped).append(str(path))
    return copied, skipped


def _fingerprint(read: list[Path], recipe: dict) -> str:
    """Changes when a file that is read is written to, moved or replaced, and when the recipe changes."""
    states = [(str(path), stat.st_size, stat.st_mtime_ns) for path in read for stat in [path.stat()]]
    return hashlib.sha256(json.dumps([states, recipe], sort_keys=True).encode()).hexdigest()[:16]


def _json_bytes(document: dict) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _make_plan(
    folder: Path,
    score: str,
    layers: Sequence[int] | None,
    target: dict,
    statistics: Path | None,
    compensate: bool,
    allocation: str,
) -> _Plan:
    sources = read_checkpoint(folder)
    stored = [tensor for shard in sources for tensor in shard.tensors]
    raw_config, config = _read_config(folder, len(stored))
    family, hidden_size, widths = config.family, config.hidden_size, list(config.widths)
    mlps = _mlp_tensors(folder, stored, family)
    if len(mlps) != len(widths):
        raise ValueError(f"{folder} holds the MLPs of {len(mlps)} layers, its config says {len(widths)}")
    for index, mlp in enumerate(mlps):
        _check_mlp(folder, index, mlp, family, hidden_size, widths[index])

    indices = check_layers(layers, len(mlps))
    before = {widths[index] for index in indices}
    if len(before) > 1:
        raise ValueError(f"the chosen layers have different widths {sorted(before)}: prune them in separate calls")
    original = before.pop()
    width = target_width(original, hidden_size, **target)
    found = None if statistics is None else Statistics.load(statistics)
    if found is not None:
        check_statistics(found, widths, indices, compensate, needs_sensitivity(score, allocation))
    pruned_widths = allocated_widths(allocation, found, indices, original, width, target["multiple_of"])

    pruned = {}
    for index in indices:
        for name, tensor in mlps[index].items():
            if name == f"{family.down}.bias":
                continue
            dim = 1 if name == f"{family.down}.weight" else 0
            shape = list(tensor.shape)
            shape[dim] = shape[dim] // original * pruned_widths[index]
            pruned[tensor.name] = _OutputTensor(tensor, tuple(shape), index, dim, compensate and dim == 1)
            widths[index] = pruned_widths[index]
    shards = [_plan_shard(shard, pruned) for shard in sources]

    outputs = [(shard.name, tensor) for shard in shards for tensor in shard.tensors]
    # A checkpoint may hold the tied head beside the embedding; it is one parameter nevertheless.
    counted = [t for _, t in outputs if not (config.tied and t.stored.name == "lm_head.weight")]
    parameters = sum(math.prod(tensor.shape) for tensor in counted)
    documents = {"config.json": _json_bytes(_pruned_config(raw_config, widths))}
    if len(shards) > 1 or shards[0].name != "model.safetensors":
        metadata = {"total_parameters": parameters, "total_size": sum(tensor.nbytes for _, tensor in outputs)}
        weight_map = {tensor.stored.name: name for name, tensor in sorted(outputs, key=lambda o: o[1].stored.name)}
        documents[INDEX_FILE] = _json_bytes({"metadata": metadata, "weight_map": weight_map})
    copied, skipped = _other_files(folder, {*documents, *(shard.name for shard in shards)})

    report = CheckpointReport(
        kept={},
        widths=pruned_widths,
        intermediate_size=width,
        original_intermediate_size=original,
        hidden_size=hidden_size,
        parameters=parameters,
        original_parameters=sum(math.prod(tensor.stored.shape) for tensor in counted),
        score=score,
        files={
            **{shard.name: shard.nbytes for shard in shards},
            **{name: len(content) for name, content in documents.items()},
            **{name: (folder / name).stat().st_size for name in copied},
        },
        skipped=skipped,
    )
    recipe = {"score": score, "widths": pruned_widths, "compensate": compensate, "config": raw_config}
    read = [shard.file for shard in sources] + ([] if statistics is None else [statistics])
    key = _fingerprint(read, recipe)
    return _Plan(folder, family, mlps, statistics, compensate, shards, documents, copied, key, report)


class _Selector:
    """Selects the neurons of a layer when they are asked for, and keeps the selections on the disk for a later run.

    What was read to score a layer is held until the next layer is scored: its tensors are usually due at once.

    buffer: what is read to score a layer; held: the stored tensors in it, by name.
    """

    def __init__(self, plan: _Plan, folder: Path):
        self._plan, self._folder = plan, folder
        family = plan.family
        self._names = list(dict.fromkeys((family.gate, family.up)))
        if _reads_down(plan.report.score):
            self._names.append(family.down)
        sizes = [sum(_aligned(tensor.nbytes) for tensor in self._scored(layer)) for layer in plan.report.layers]
        self.buffer = torch.empty(max(sizes), dtype=torch.uint8)
        self.held: dict[str, torch.Tensor] = {}
        saved = (json.loads(file.read_text()) for file in folder.glob("*.json"))
        self._kept = {int(layer): torch.tensor(kept) for file in saved for layer, kept in file.items()}
        self._unsaved: dict[int, list[int]] = {}

    def _scored(self, layer: int) -> list[StoredTensor]:
        return [self._plan.mlps[layer][f"{name}.weight"] for name in self._names]

    def kept_by(self, layer: int) -> torch.Tensor:
        """int64 `[width]`, ascending."""
        if layer in self._kept:
            return self._kept[layer]
        self.held.clear()
        rest = self.buffer
        for stored in self._scored(layer):
            (self.held[stored.name],) = _read(stored, [_view(rest, stored.dtype, stored.shape)])
            rest = rest[_aligned(stored.nbytes) :]
        weights = _Weights.of(self._plan.family, list(self.held.values()))
        score = score_layer(self._plan.report.score, weights, layer, self._activations(layer))
        kept = select(score, self._plan.report.widths[layer])
        self._kept[layer], self._unsaved[layer] = kept, kept.tolist()
        return kept

    def save(self, name: str) -> None:
        """Keep what was selected since the last call in a file of its own."""
        if self._unsaved:
            atomic.write_file(self._folder / f"{name}.json", [json.dumps(self._unsaved).encode()])
            self._unsaved = {}

    def _activations(self, layer: int) -> LayerStatistics | None:
        if self._plan.statistics is None:
            return None
        return Statistics.load(self._plan.statistics, [layer]).layers[layer]

    def resolved_down(self, layer: int, stored: StoredTensor) -> torch.Tensor:
        """The stored down projection `[H, I]` of a layer, solved anew for the neurons that stay: `[H, width]`."""
        kept = self.kept_by(layer)
        down = self.held.get(stored.name)
        if down is None:
            (down,) = _read(stored, [torch.empty(stored.shape, dtype=DTYPES[stored.dtype])])
        return resolved_down(down, kept, self._activations(layer).gram, f"layer {layer}")


class _Weights(NamedTuple):
    """Gate `[I, H]`, up `[I, H]` and down `[H, I]` of one layer, to be scored like a `families.GLU`."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of(cls, family: Family, projections: list[torch.Tensor]) -> _Weights:
        """From the distinct projections; where down is left out, as the score ignores it, it is all NaN."""
        gate, up, *down = (*projections[0].chunk(2), *projections[1:]) if family.packed else projections
        return cls(gate, up, down[0] if down else torch.full((1, 1), math.nan).expand(gate.shape[::-1]))

    @property
    def intermediate_size(self) -> int:
        return len(self.gate)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _ahead(items: Iterator, depth: int, threads: int) -> Iterator:
    """The items of an iterator that a thread advances, up to `depth` items ahead: reading goes on while writing.

    In that thread torch works with `threads` threads.
    """
    end, torch_threads = object(), torch.get_num_threads()
    thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
    try:
        due = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := due.popleft().result()) is not end:
            due.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)  # the number for threads to come


def _chunks(shards: list[_OutputShard], selector: _Selector) -> Iterator[bytes | memoryview | None]:
    """The bytes of the shards in order; None ends a shard."""
    for shard in shards:
        yield from shard.chunks(selector)
        # Before the shard has its name: it must not outlive the selections that it was made with.
        selector.save(shard.name)
        yield None


def _write(plan: _Plan, folder: Path) -> dict[int, torch.Tensor]:
    """Fill the folder, going on with what an earlier run left there. Returns the selection of every pruned layer."""
    selector = _Selector(plan, folder.with_name(_SELECTIONS))
    unfinished = [shard for shard in plan.shards if not shard.is_finished(folder)]
    needed, free = sum(shard.nbytes for shard in unfinished), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are to be written, {free:,} are free", str(folder.parent.parent))
    # Far enough ahead to write one layer while the next is scored.
    depth = max(4, selector.buffer.nbytes // 2 // _BLOCK_BYTES)
    # Without matrix products scoring takes less time than reading: helpers that wait for one another would only contend
    # with the writing for the cores.
    threads = torch.get_num_threads() if plan.compensate else 1
    chunks = _ahead(_chunks(unfinished, selector), depth, threads)
    # Closing waits for the thread: after a failure nothing may be written any more when the folder is given up.
    bar = tqdm(total=needed, desc="pruning", unit="B", unit_scale=True, disable=None, leave=False)
    with closing(chunks), bar:
        for shard in unfinished:
            atomic.write_file(folder / shard.name, iter(chunks.__next__, None), bar.update)
    for name, content in plan.documents.items():
        atomic.write_file(folder / name, [content])
    for name in plan.copied:
        atomic.write_file(folder / name, atomic.read_chunks(plan.folder / name))
    return {layer: selector.kept_by(layer) for layer in plan.report.layers}


def _local_folder(source: str | Path) -> Path:
    """A model folder, downloaded first if `source` is a Hub id. An interrupted download goes on where it stopped."""
    if Path(source).is_dir():
        return Path(source).absolute()
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise ValueError(f"{source} is neither a model folder nor a Hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED))
    except Exception as error:  # the Hub client passes on errors of many kinds
        raise ValueError(f"{source} is neither a model folder nor a reachable Hub id: {_first_line(error)}") from error


def prune_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    expansion_ratio: float | None = None,
    pruning_ratio: float | None = None,
    intermediate_size: int | None = None,
    score: str = "maw",
    multiple_of: int = 128,
    layers: Sequence[int] | None = None,
    statistics: str | Path | None = None,
    compensate: bool = False,
    allocation: str = "uniform",
    dry_run: bool = False,
    resume: bool = False,
) -> CheckpointReport:
    """Prune a safetensors checkpoint on the disk into a new one, without building the model.

    Every tensor equals, byte for byte, what `load`, `prune` with the same arguments and `save` give. Shards keep their
    names; tokenizer, chat template and other files are copied, weights of other formats are not. Memory: the
    projections of one layer that the score reads, and half of that again for output on its way. The destination appears
    when everything is on the disk. After a failure, finished shards wait for `resume` in a hidden folder
    `.<destination>.<key>.partial` beside it.

    Args:
        source: a model folder, or a Hub id, which is downloaded first. It is never written to.
        destination: a folder that does not exist or is empty, outside the source.
        expansion_ratio, pruning_ratio, intermediate_size, multiple_of, layers: as in `prune`.
        score: "maw" (= "ppm"), "maw_gud", "vow", "pon", "l2"; with statistics also "activation", "hybrid" and
            "surgeon".
        statistics: the file of a calibration pass (`Statistics.save`, `gluprune calibrate`) over this model, for the
            calibrated scores, `compensate` and `allocation`, otherwise not looked at. One layer of it is read at a time.
        compensate: re-solve the down projections, as in `prune`. This needs statistics with Gram matrices, and
            takes a few float32 matrices `[I, I]` above the memory named above.
        allocation: "uniform" or "sensitivity", as in `prune`.
        dry_run: check headers and arguments and report what would come out; no weight is read, nothing is written.
        resume: go on where an earlier run with the same source and arguments stopped. Without it, begin anew.

    Raises:
        ValueError: bad arguments, a corrupt or unsupported checkpoint, or a source that changes meanwhile.
        TypeError: an argument of the wrong type.
        OSError: a file cannot be read or written (a full disk, say); the message names it.
    """
    if not isinstance(score, str) or score not in {**STATIC_SCORES, **CALIBRATED_SCORES}:
        allowed = ", ".join([*STATIC_SCORES, *CALIBRATED_SCORES])
        raise ValueError(f"unknown score {score!r}: allowed for a checkpoint on the disk are {allowed}")
    if not isinstance(compensate, bool):
        raise TypeError(f"compensate must be True or False, got {compensate!r}")
    calibrated = what_needs_calibration(score, compensate, allocation)
    if not calibrated:
        statistics = None
    elif statistics is None:
        raise ValueError(f"{calibrated} needs calibration statistics: give statistics=")
    target = Path(destination).resolve()
    if Path(source).is_dir() and Path(source).resolve() in (target, *target.parents):
        raise ValueError(f"output folder {destination} must lie outside the source {source}")
    check_destination(destination)
    ratios = {"expansion_ratio": expansion_ratio, "pruning_ratio": pruning_ratio}
    folder = _local_folder(source)
    statistics = None if statistics is None else Path(statistics).absolute()
    widths = {**ratios, "width": intermediate_size, "multiple_of": multiple_of}
    arguments = (folder, score, layers, widths, statistics, compensate, allocation)
    plan = _make_plan(*arguments)
    if dry_run:
        return plan.report
    with complete_folder(destination, plan.key, resume) as output:
        kept = _write(plan, output)
        if _make_plan(*arguments).key != plan.key:
            raise ValueError(f"{folder}{f' or {statistics}' if statistics else ''} changed while it was read")
    return replace(plan.report, kept=kept)
