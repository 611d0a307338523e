"""Neuron activations on text: statistics of the inputs of `down_proj`.

Let X `[T, I]` be the inputs of a layer's `down_proj` over all T calibration tokens, without padding. The statistics
hold the column norms of X, for the calibrated scores. On request they also hold the Gram matrix `G = X^T X`, from which
every least-squares problem on X can be solved without X (`gluprune.pruning.compensate`), and how sensitive the loss is
to the removal of neurons (`gluprune.calibration.sensitivity`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gluprune.io.atomic import check_space, write_file
from gluprune.io.shards import encode_header
from gluprune.models.glu import GLU

# Rows of X that are upcast to float32 at a time: bounds the scratch memory, however large a batch is.
_ROWS = 4096
# Columns per block of the Gram matrix. Only blocks on and above the diagonal are computed: about half the operations.
_BLOCK = 256
# Weights of a layer by which its model is recognised.
_FIRST = 16
# Raised when the meaning of what is stored changes.
VERSION = 2
_FORMAT = f"gluprune statistics {VERSION}"


def first_weights(down: torch.Tensor) -> torch.Tensor:
    """Return the first weights of a down projection, in which models of one shape differ.

    Args:
        down: `[H, I]` or its first row `[1, I]`, of any dtype.

    Returns:
        float32 `[min(I, 16)]`.
    """
    return down[0, :_FIRST].float()


@dataclass(eq=False, repr=False)
class LayerStatistics:
    """Statistics of X `[T, I]` of one layer, all float32 on the device of the layer's weights.

    Attributes:
        squares: `[I]`, sum of squares over all tokens.
        batch_norms: `[I]`, sum over the batches of the L2 norm within the batch. It depends on how the text is cut into
            batches, and is kept because OptiPFair's hybrid score is defined on it.
        gram: `[I, I]`, X^T X, or None if not requested.
        saliency: `[I]`, see `gluprune.calibration.sensitivity.saliencies`, or None if not requested.
        costs: `[16]`, see `gluprune.calibration.sensitivity.narrowing_costs`, or None if not requested.
        weights: What `first_weights` returns, by which the model is recognised; None in older files.
    """

    squares: torch.Tensor
    batch_norms: torch.Tensor
    gram: torch.Tensor | None = None
    saliency: torch.Tensor | None = None
    costs: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def __repr__(self) -> str:
        held = ", ".join(name for name, tensor in vars(self).items() if tensor is not None)
        return f"LayerStatistics({len(self.squares)} neurons: {held})"

    @property
    def norms(self) -> torch.Tensor:
        """float32 `[I]`, L2 norm of every neuron's activations over all tokens."""
        return self.squares.sqrt()

    @classmethod
    def empty(cls, glu: GLU, *, gram: bool) -> LayerStatistics:
        """Return statistics of no tokens for a GLU."""
        size, device = glu.intermediate_size, glu.down.weight.device
        squares, batch_norms = torch.zeros(2, size, dtype=torch.float32, device=device).unbind()
        sums = torch.zeros(size, size, dtype=torch.float32, device=device) if gram else None
        return cls(squares, batch_norms, sums, weights=first_weights(glu.down.weight.detach()))

    def to(self, device: torch.device) -> LayerStatistics:
        """Return the statistics on a device."""
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device) for name, tensor in vars(self).items()
        }
        return LayerStatistics(**moved)

    def add(self, x: torch.Tensor) -> None:
        """Add one batch, `[T, I]` of any dtype. The Gram matrix is valid only after `complete`."""
        squares = torch.zeros_like(self.squares)
        for chunk in x.split(_ROWS):
            rows = chunk.float()
            squares += rows.square().sum(0)
            if self.gram is not None:
                for start in range(0, rows.shape[1], _BLOCK):
                    stop = start + _BLOCK
                    self.gram[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self.squares += squares
        self.batch_norms += squares.sqrt()

    def complete(self) -> None:
        """Mirror the Gram matrix at its diagonal; `add` sums up only the part above."""
        if self.gram is not None:
            for start in range(0, len(self.gram), _BLOCK):
                stop = start + _BLOCK
                self.gram[stop:, start:stop] = self.gram[start:stop, stop:].T


@dataclass(eq=False, repr=False)
class Statistics:
    """Statistics of several layers of one model: collected once, valid for pruning it to any number of widths.

    Attributes:
        layers: Layer index -> its statistics.
        tokens: Number of calibration tokens T, without padding.
        texts: Name -> SHA-256 of the texts they were collected on, as far as the caller gives them.

    Example:
        >>> import gluprune
        >>> from transformers import AutoTokenizer
        >>> model, tokenizer = gluprune.load(model_path), AutoTokenizer.from_pretrained(model_path)
        >>> batches = gluprune.batches_from_text(tokenizer, "A long text. " * 100, windows=2, length=64)
        >>> statistics = gluprune.calibrate(model, batches)
        >>> statistics.tokens
        128
        >>> statistics.save(folder / "model.statistics")
        >>> gluprune.Statistics.load(folder / "model.statistics").tokens
        128
    """

    layers: dict[int, LayerStatistics]
    tokens: int
    texts: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Statistics({len(self.layers)} layers, {self.tokens} tokens)"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. It gets its final name only when it is complete.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be written; an existing file of that name is unchanged.
        """
        shapes = {
            layer: {name: tuple(tensor.shape) for name, tensor in vars(found).items() if tensor is not None}
            for layer, found in self.layers.items()
        }
        write_statistics(Path(path), shapes, self.layers.items(), tokens=self.tokens, texts=self.texts)

    @classmethod
    def load(cls, path: str | Path, layers: Sequence[int] | None = None) -> Statistics:
        """Read what `save` wrote, onto the CPU.

        The file is mapped into memory; only tensors that are used are read from disk.

        Args:
            path: The file.
            layers: Read only those of these layers that the file has; None means all.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is a folder, or the file was not written by `save`.
        """
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder, not a file of calibration statistics")
        found: dict[int, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no calibration statistics of this version of gluprune")
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    layer, name = key.split(".")
                    if layers is None or int(layer) in layers:
                        found.setdefault(int(layer), {})[name] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
        texts = json.loads(metadata.get("texts", "{}"))
        return cls({layer: LayerStatistics(**found[layer]) for layer in sorted(found)}, int(metadata["tokens"]), texts)


def write_statistics(
    path: Path,
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]],
    layers: Iterable[tuple[int, LayerStatistics]],
    *,
    tokens: int,
    texts: Mapping[str, str],
) -> None:
    """Write a file of statistics, one layer after the other; see `Statistics.save`.

    Args:
        path: The file.
        shapes: Layer index -> name of a tensor -> its shape, for all that is written, in order.
        layers: Layer index and statistics, in the same order.
        tokens: See `Statistics`.
        texts: See `Statistics`.

    Raises:
        OSError: There is not enough space, which is noticed before the first layer is taken, or the file cannot be
            written.
    """
    names = [(f"{layer}.{name}", "F32", shape) for layer, named in shapes.items() for name, shape in named.items()]
    check_space(path.parent, 4 * sum(math.prod(shape) for *_, shape in names))
    header = encode_header(names, {"format": _FORMAT, "tokens": str(tokens), "texts": json.dumps(dict(texts))})

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for layer, found in layers:
            for name in shapes[layer]:
                yield getattr(found, name).contiguous().cpu().view(-1).view(torch.uint8).numpy().data

    write_file(path, chunks())
