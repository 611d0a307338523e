"""Write a planned checkpoint: copy its tensors block by block, and narrow the MLP tensors on the way."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gluprune.calibration.statistics import LayerStatistics, Statistics
from gluprune.checkpoints.plan import OutputPlan, OutputShard, OutputTensor
from gluprune.io import atomic
from gluprune.io.progress import progress
from gluprune.io.shards import DTYPES, StoredTensor
from gluprune.models.families import Family
from gluprune.pruning.compensate import refitted_down
from gluprune.pruning.scores import CALIBRATED_SCORES, Score, score_layer, static_score
from gluprune.pruning.widths import select

_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy has no bf16, and moving needs no arithmetic
_SELECTIONS = "selections"
# Bytes that are read at a time: enough to amortise the calls, few enough to stay in a core's cache until written.
_BLOCK_BYTES = 1 << 21


def write_plan(plan: OutputPlan, folder: Path) -> dict[int, torch.Tensor]:
    """Write the missing files of a planned checkpoint to a folder.

    Returns:
        Layer index -> int64 `[width]`, the kept neurons of every pruned layer.

    Raises:
        ValueError: A source file is corrupt, or a score is not usable.
        OSError: There is not enough space, or a file cannot be read or written.
    """
    selector = Selector(plan, folder.with_name(_SELECTIONS))
    unfinished = [shard for shard in plan.shards if not shard.is_finished(folder)]
    needed = sum(shard.nbytes for shard in unfinished)
    atomic.check_space(folder.parent.parent, needed)
    # Far enough ahead to write one layer while the next is scored.
    depth = max(4, selector.buffer.nbytes // 2 // _BLOCK_BYTES)
    # Without matrix products, scoring takes less time than reading: threads that wait for each other would only compete
    # with the writing for the cores.
    threads = torch.get_num_threads() if plan.recipe.compensate else 1
    chunks = _ahead(_chunks(unfinished, selector), depth, threads)
    # Closing waits for the thread: after a failure, nothing may be written once the folder is removed.
    bar = progress(total=needed, desc="pruning", unit="B", unit_scale=True)
    with closing(chunks), bar:
        for shard in unfinished:
            atomic.write_file(folder / shard.name, iter(chunks.__next__, None), bar.update)
    for name, content in plan.documents.items():
        atomic.write_file(folder / name, [content])
    for name in plan.copied:
        atomic.write_file(folder / name, atomic.read_chunks(plan.folder / name))
    return {layer: selector.kept_by(layer) for layer in plan.report.layers}


def _chunks(shards: Sequence[OutputShard], selector: Selector) -> Iterator[bytes | memoryview | None]:
    """Yield the bytes of the shards in order; None ends a shard."""
    for shard in shards:
        yield shard.header
        for tensor in shard.tensors:
            for block in _blocks(tensor, selector):
                yield block.reshape(-1).view(np.uint8).data
        # Before the shard has its name: it must not outlive the selections that it was written with.
        selector.save(shard.name)
        yield None


def _blocks(tensor: OutputTensor, selector: Selector) -> Iterator[np.ndarray]:
    """Yield the data of an output tensor in order, block by block."""
    stored = tensor.stored
    if tensor.layer is None:
        sizes = (min(_BLOCK_BYTES, stored.nbytes - start) for start in range(0, stored.nbytes, _BLOCK_BYTES))
        for block in stored.read(torch.empty(size, dtype=torch.uint8) for size in sizes):
            yield block.numpy()
    elif tensor.refitted:
        weight = selector.refitted_down(tensor.layer, stored)
        block_rows = max(1, _BLOCK_BYTES // (weight.shape[1] * stored.itemsize))
        yield from (rows.view(_SAME_SIZE[stored.itemsize]).numpy() for rows in weight.split(block_rows))
    else:
        yield from _narrowed_blocks(tensor, selector.kept_by(tensor.layer).numpy(), selector.held.get(stored.name))


def _narrowed_blocks(tensor: OutputTensor, kept: np.ndarray, held: torch.Tensor | None) -> Iterator[np.ndarray]:
    """Yield the kept entries of a stored tensor, which is read unless it is `held` in memory."""
    stored = tensor.stored
    # A packed projection holds two runs of I entries, each of which keeps the same neurons.
    runs = tensor.shape[tensor.dim] // len(kept)
    run_length = stored.shape[tensor.dim] // runs
    indices = np.concatenate([kept + run * run_length for run in range(runs)])
    rows, row_bytes = stored.shape[0], stored.nbytes // stored.shape[0]
    block_rows = max(1, _BLOCK_BYTES // row_bytes)
    starts = range(0, rows, block_rows)
    if held is not None:
        blocks = iter(held.split(block_rows))
    else:
        buffer = torch.empty(min(block_rows, rows) * row_bytes, dtype=torch.uint8)
        shapes = ((min(block_rows, rows - start), *stored.shape[1:]) for start in starts)
        blocks = stored.read(_view(buffer, stored.dtype, shape) for shape in shapes)
    for block, start in zip(blocks, starts, strict=True):
        # numpy's take is twice as fast as torch's indexing here, and leaves the other cores free for the writing
        # thread.
        entries = block.view(_SAME_SIZE[stored.itemsize]).numpy()
        if tensor.dim == 1:
            yield entries.take(indices, axis=1)
        else:
            first, last = np.searchsorted(indices, (start, start + len(block)))
            yield entries.take(indices[first:last] - start, axis=0)


def _view(buffer: torch.Tensor, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the beginning of a uint8 buffer as a tensor."""
    return buffer[: math.prod(shape) * DTYPES[dtype].itemsize].view(DTYPES[dtype]).view(shape)


def _ahead(items: Iterator, depth: int, threads: int) -> Generator:
    """Yield the items of an iterator that a thread advances up to `depth` items ahead, to read while writing.

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
        torch.set_num_threads(torch_threads)  # the number for threads that start later


class Selector:
    """Selects the neurons of a layer on first use, and keeps the selections on disk for a later run.

    What was read to score a layer is held until the next layer is scored: its tensors are usually written next.

    Attributes:
        buffer: Memory for what is read to score a layer.
        held: The stored tensors in it, by name.
    """

    def __init__(self, plan: OutputPlan, folder: Path):
        self._plan, self._folder = plan, folder
        family = plan.family
        self._names = list(dict.fromkeys((family.gate, family.up)))
        if _uses_down(plan.recipe.score):
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
        """Return the kept neurons of a layer, int64 `[width]`, ascending."""
        if layer in self._kept:
            return self._kept[layer]
        self.held.clear()
        rest = self.buffer
        for stored in self._scored(layer):
            (self.held[stored.name],) = stored.read([_view(rest, stored.dtype, stored.shape)])
            rest = rest[_aligned(stored.nbytes) :]
        weights = _Weights.of(self._plan.family, list(self.held.values()))
        score = score_layer(self._plan.recipe.score, weights, layer, self._activations(layer))
        kept = select(score, self._plan.report.widths[layer])
        self._kept[layer], self._unsaved[layer] = kept, kept.tolist()
        return kept

    def save(self, name: str) -> None:
        """Write the selections since the last call to a file."""
        if self._unsaved:
            atomic.write_file(self._folder / f"{name}.json", [json.dumps(self._unsaved).encode()])
            self._unsaved = {}

    def _activations(self, layer: int) -> LayerStatistics | None:
        if self._plan.statistics is None:
            return None
        return Statistics.load(self._plan.statistics, [layer]).layers[layer]

    def refitted_down(self, layer: int, stored: StoredTensor) -> torch.Tensor:
        """Return the stored down projection `[H, I]` of a layer, refitted to its kept neurons: `[H, width]`."""
        kept = self.kept_by(layer)
        down = self.held.get(stored.name)
        if down is None:
            (down,) = stored.read([torch.empty(stored.shape, dtype=DTYPES[stored.dtype])])
        statistics = self._activations(layer)
        assert statistics is not None and statistics.gram is not None
        return refitted_down(down, kept, statistics.gram, f"layer {layer}")


def _uses_down(score: str | Score) -> bool:
    """Whether a score depends on the down projection: if so, NaN there is passed on."""
    if callable(score) or score in CALIBRATED_SCORES:
        return True
    ones = torch.ones(1, 2)
    return bool(static_score(score, ones, ones, torch.full((2, 1), math.nan)).isnan())


class _Weights(NamedTuple):
    """Gate `[I, H]`, up `[I, H]` and down `[H, I]` of one layer, as `score_layer` takes them."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of(cls, family: Family, projections: list[torch.Tensor]) -> _Weights:
        """Return the weights from the distinct projections; a down projection that no score uses is all NaN."""
        gate, up, *down = (*projections[0].chunk(2), *projections[1:]) if family.packed else projections
        return cls(gate, up, down[0] if down else torch.full((1, 1), math.nan).expand(gate.shape[::-1]))

    @property
    def intermediate_size(self) -> int:
        return len(self.gate)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
