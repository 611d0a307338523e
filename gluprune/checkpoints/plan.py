"""What pruning a checkpoint on disk will write: everything that is known before the first weight is read."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gluprune.calibration.statistics import Statistics
from gluprune.checkpoints.card import History
from gluprune.checkpoints.source import SourceConfig, mlp_tensors, other_files, read_source_config
from gluprune.io.shards import INDEX_FILE, SINGLE_FILE, Shard, StoredTensor, encode_header, read_checkpoint
from gluprune.models.families import Family
from gluprune.models.widths import check_layers, widths_after, with_widths
from gluprune.pruning.checks import check_statistics, common_width
from gluprune.pruning.history import calibration_entry, prune_step
from gluprune.pruning.recipe import Recipe
from gluprune.pruning.report import PruneReport
from gluprune.pruning.widths import planned_widths, target_width


@dataclass(frozen=True, eq=False)
class CheckpointReport(PruneReport):
    """What `prune_checkpoint` wrote, or with `dry_run` would write (`kept` is empty then).

    Attributes:
        files: Name -> size in bytes, for every file of the output.
        skipped: Files of the source that are not in the output: other weight formats, hidden files, linked folders.
        differ: Whether the layers of the output have different widths, also those that were not pruned.
    """

    files: dict[str, int]
    skipped: list[str]
    differ: bool

    @property
    def layers(self) -> list[int]:
        """Indices of the pruned layers."""
        return list(self.widths)

    def to_dict(self) -> dict:
        """Return everything as plain numbers, strings and lists, ready for JSON."""
        own = {"layers": self.layers, "files": self.files, "skipped": self.skipped, "differ": self.differ}
        return {**super().to_dict(), **own}

    def __repr__(self) -> str:
        text = f"{super().__repr__()}; {len(self.files)} files of {sum(self.files.values()):,} bytes"
        return text + (f"; not copied: {', '.join(self.skipped)}" if self.skipped else "")


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        stored: The tensor of the source.
        shape: The shape in the output.
        layer: Index of the layer whose neurons are removed; None if the tensor is copied.
        dim: The dimension along which they are removed.
        refitted: Whether it is a down projection that is refitted to the kept neurons.
    """

    stored: StoredTensor
    shape: tuple[int, ...]
    layer: int | None = None
    dim: int = 0
    refitted: bool = False

    @property
    def nbytes(self) -> int:
        """Size in the output."""
        return math.prod(self.shape) * self.stored.itemsize


@dataclass(frozen=True)
class OutputShard:
    """One safetensors file of the output: its name, its header and its tensors in order."""

    name: str
    header: bytes
    tensors: list[OutputTensor]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def is_finished(self, folder: Path) -> bool:
        """Whether the file exists. Only a complete file has its final name; size and header exclude other files."""
        path = folder / self.name
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header


@dataclass(frozen=True)
class OutputPlan:
    """Everything that is known before the first weight is read.

    Attributes:
        folder: The source.
        family: The table entry of its model type.
        mlps: The MLP tensors of every layer.
        recipe: How neurons are chosen and weights refitted.
        statistics: The file of calibration statistics, or None if the recipe needs none.
        shards: The safetensors files of the output.
        documents: The JSON files of the output, by name.
        copied: Files that are copied from the source.
        key: Digest of the current state of the source and of the operation on it.
        report: What the result will be.
    """

    folder: Path
    family: Family
    mlps: list[dict[str, StoredTensor]]
    recipe: Recipe
    statistics: Path | None
    shards: list[OutputShard]
    documents: dict[str, bytes]
    copied: list[str]
    key: str
    report: CheckpointReport

    def key_now(self) -> str:
        """Return the key with the source as it is now: another one, if a file has changed."""
        shards = read_checkpoint(self.folder)
        config = read_source_config(self.folder, sum(len(shard.tensors) for shard in shards))
        return _fingerprint(shards, self.statistics, self.recipe, self.report.widths, config)


def make_plan(
    folder: Path, recipe: Recipe, *, target: dict, layers: Sequence[int] | None, statistics: Path | None
) -> OutputPlan:
    """Read the headers and the config of a checkpoint, and plan the output.

    Args:
        folder: The source.
        recipe: How neurons are chosen and weights refitted.
        target: The keyword arguments of `target_width` that give the target width.
        layers: Indices of the layers to prune; None means all.
        statistics: File of calibration statistics, or None.

    Raises:
        ValueError: Bad arguments, or a corrupt or unsupported checkpoint.
        TypeError: An argument of the wrong type.
        OSError: A file cannot be read.
    """
    sources = read_checkpoint(folder)
    stored = [tensor for shard in sources for tensor in shard.tensors]
    config = read_source_config(folder, len(stored))
    mlps = mlp_tensors(folder, stored, config)
    indices = check_layers(layers, len(mlps))
    original = common_width(config.widths, indices)
    width = target_width(original, config.hidden_size, multiple_of=recipe.width_multiple, **target)
    found = None if statistics is None else Statistics.load(statistics)
    if found is not None:
        downs = [mlp[f"{config.family.down}.weight"] for mlp in mlps]
        check_statistics(found, config.widths, indices, recipe, lambda index: downs[index].first_row())
    sizes = {"heads": config.heads, "hidden_size": config.hidden_size}
    widths = planned_widths(config.widths, indices, recipe, found, width=width, model_type=config.model_type, **sizes)
    pruned = _pruned_tensors(mlps, config.family, recipe, widths, original)
    shards = [_plan_shard(shard, pruned) for shard in sources]
    counted = _parameters(shards, config)
    summary = PruneReport(
        kept={},
        widths=widths,
        intermediate_size=width,
        original_intermediate_size=original,
        hidden_size=config.hidden_size,
        parameters=sum(math.prod(tensor.shape) for tensor in counted),
        original_parameters=sum(math.prod(tensor.stored.shape) for tensor in counted),
        score=recipe.score_name,
        multiple_of=recipe.width_multiple,
        deploy=recipe.deploy,
    )
    step = prune_step(summary, recipe, None if statistics is None else _calibration(found, statistics))
    after = widths_after(config.widths, widths)
    documents = _documents(config, shards, after, summary.parameters) | _history(folder, config, after, step)
    copied, skipped = other_files(folder, {*documents, *(shard.name for shard in shards)})
    report = CheckpointReport(
        **vars(summary),
        files={
            **{shard.name: shard.nbytes for shard in shards},
            **{name: len(content) for name, content in documents.items()},
            **{name: (folder / name).stat().st_size for name in copied},
        },
        skipped=skipped,
        differ=len(set(after)) > 1,
    )
    return OutputPlan(
        folder=folder,
        family=config.family,
        mlps=mlps,
        recipe=recipe,
        statistics=statistics,
        shards=shards,
        documents=documents,
        copied=copied,
        key=_fingerprint(sources, statistics, recipe, widths, config),
        report=report,
    )


def _pruned_tensors(
    mlps: list[dict[str, StoredTensor]], family: Family, recipe: Recipe, widths: dict[int, int], original: int
) -> dict[str, OutputTensor]:
    """Return the tensors that change, by name."""
    pruned = {}
    for index, width in widths.items():
        for name, tensor in mlps[index].items():
            if name == f"{family.down}.bias":
                continue
            dim = 1 if name == f"{family.down}.weight" else 0
            shape = list(tensor.shape)
            shape[dim] = shape[dim] // original * width
            pruned[tensor.name] = OutputTensor(
                stored=tensor,
                shape=tuple(shape),
                layer=index,
                dim=dim,
                refitted=recipe.compensate and dim == 1,
            )
    return pruned


def _parameters(shards: list[OutputShard], config: SourceConfig) -> list[OutputTensor]:
    """Return the tensors that count as parameters."""
    # A checkpoint may hold the tied head besides the embedding; it still counts as one parameter.
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return [tensor for tensor in tensors if not (config.tied and tensor.stored.name.endswith("lm_head.weight"))]


def _plan_shard(shard: Shard, pruned: dict[str, OutputTensor]) -> OutputShard:
    # Widest type first, as the format's own writer does, so that every tensor begins at a multiple of its element size.
    stored = sorted(shard.tensors, key=lambda tensor: -tensor.itemsize)
    tensors = [pruned.get(tensor.name, OutputTensor(tensor, tensor.shape)) for tensor in stored]
    header = encode_header(
        [(tensor.stored.name, tensor.stored.dtype, tensor.shape) for tensor in tensors],
        {**shard.metadata, "format": "pt"},
    )
    return OutputShard(shard.file.name, header, tensors)


def _documents(config: SourceConfig, shards: list[OutputShard], widths: list[int], parameters: int) -> dict[str, bytes]:
    """Return the JSON files of the output: the config and, if there are several shards, the index."""
    # The rest of the config stays as it is, so that the output loads wherever the source loads.
    entries = with_widths(config.text_entries, widths)
    document = entries if config.text_entries is config.raw else {**config.raw, "text_config": entries}
    documents = {"config.json": _json_bytes(document)}
    if len(shards) > 1 or shards[0].name != SINGLE_FILE:
        outputs = [(shard.name, tensor) for shard in shards for tensor in shard.tensors]
        metadata = {"total_parameters": parameters, "total_size": sum(tensor.nbytes for _, tensor in outputs)}
        weight_map = {tensor.stored.name: name for name, tensor in sorted(outputs, key=lambda o: o[1].stored.name)}
        documents[INDEX_FILE] = _json_bytes({"metadata": metadata, "weight_map": weight_map})
    return documents


def _history(folder: Path, config: SourceConfig, widths: list[int], step: dict) -> dict[str, bytes]:
    """Return the files that say where the output comes from."""
    architecture, *_ = config.raw.get("architectures") or ["AutoModelForCausalLM"]
    return History.of(folder).documents([step], architecture, widths)


def _calibration(statistics: Statistics | None, file: Path) -> dict:
    entry = calibration_entry(statistics)
    if not entry["texts"]:
        state = file.stat()
        entry["statistics"] = _sha256(file, state.st_size, state.st_mtime_ns)
    return entry


@functools.cache
def _sha256(file: Path, size: int, mtime: int) -> str:
    """Return the SHA-256 of a file, computed once for this size and time."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _json_bytes(document: dict) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _fingerprint(
    shards: Sequence[Shard], statistics: Path | None, recipe: Recipe, widths: Mapping[int, int], config: SourceConfig
) -> str:
    """Return a digest that changes if the task changes, or if a source file is written, moved or replaced."""
    read = [shard.file for shard in shards] + ([] if statistics is None else [statistics])
    states = [(str(path), stat.st_size, stat.st_mtime_ns) for path in read for stat in [path.stat()]]
    task = {"score": recipe.score_name, "widths": widths, "compensate": recipe.compensate, "config": config.raw}
    return hashlib.sha256(json.dumps([states, task], sort_keys=True).encode()).hexdigest()[:16]
