"""What the neurons do on real text: statistics of the inputs of `down_proj`, collected in one streaming pass.

Let X `[T, I]` be the inputs of a layer's `down_proj` over all T calibration tokens, padding left out. Kept of it are
the column norms, for the calibrated scores, and when asked for the Gram matrix `G = X^T X`, from which every
least-squares problem on X can be solved without X (`gluprune.pruning.compensate`), and what the loss makes of it that neurons go
(`gluprune.calibration.sensitivity`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from gluprune.calibration.sensitivity import (
    Batch,
    LayerGradients,
    is_half_on_cpu,
    narrowing_costs,
    output_gradients,
    saliencies,
)
from gluprune.models.families import GLU, decoder_layers, model_glus

logger = logging.getLogger(__name__)

# Rows of X upcast to float32 at a time: bounds the scratch however large a batch is.
_ROWS = 4096
# Columns of a block of the Gram matrix. Only blocks on and above the diagonal are computed: about half the operations.
_BLOCK = 256
# Raised when what is stored changes its meaning.
VERSION = 2
_FORMAT = f"gluprune statistics {VERSION}"


@dataclass
class LayerStatistics:
    """Statistics of one layer's X `[T, I]`, all float32 on the device of the layer's weights.

    squares: `[I]`, sum of squares over all tokens.
    batch_norms: `[I]`, sum over the batches of the L2 norm within the batch. Depends on how the text is cut into
        batches; kept because OptiPFair's hybrid score is defined on it.
    gram: `[I, I]`, X^T X, or None where it was not asked for.
    saliency: `[I]`, of every neuron (`gluprune.calibration.sensitivity.saliencies`), or None where it was not asked for.
    costs: `[16]`, of narrowing the layer (`gluprune.calibration.sensitivity.narrowing_costs`), or None likewise.
    """

    squares: torch.Tensor
    batch_norms: torch.Tensor
    gram: torch.Tensor | None = None
    saliency: torch.Tensor | None = None
    costs: torch.Tensor | None = None

    @property
    def norms(self) -> torch.Tensor:
        """float32 `[I]`, L2 norm of every neuron's activations over all tokens."""
        return self.squares.sqrt()

    @classmethod
    def empty(cls, glu: GLU, gram: bool) -> LayerStatistics:
        size, device = glu.intermediate_size, glu.down.weight.device
        squares, batch_norms = torch.zeros(2, size, device=device).unbind()
        return cls(squares, batch_norms, torch.zeros(size, size, device=device) if gram else None)

    def to(self, device: torch.device) -> LayerStatistics:
        return LayerStatistics(*(None if tensor is None else tensor.to(device) for tensor in vars(self).values()))

    def add(self, x: torch.Tensor) -> None:
        """Take in one batch, `[T, I]` of any dtype. The Gram matrix is valid only after `complete`."""
        squares = torch.zeros_like(self.squares)
        for rows in x.split(_ROWS):
            rows = rows.float()
            squares += rows.square().sum(0)
            if self.gram is not None:
                for start in range(0, rows.shape[1], _BLOCK):
                    stop = start + _BLOCK
                    self.gram[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self.squares += squares
        self.batch_norms += squares.sqrt()

    def complete(self) -> None:
        """Mirror the part of the Gram matrix above the diagonal, which is what `add` sums up, to below it."""
        if self.gram is not None:
            for start in range(0, len(self.gram), _BLOCK):
                stop = start + _BLOCK
                self.gram[stop:, start:stop] = self.gram[start:stop, stop:].T


@dataclass
class Statistics:
    """Statistics of several layers of one model: collected once, good for pruning it to any number of widths.

    layers: layer index -> its statistics.
    tokens: number of calibration tokens T, padding left out.
    """

    layers: dict[int, LayerStatistics]
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, which takes its name when it is complete.

        Raises:
            OSError: the file cannot be written; a file that was there stays as it was.
        """
        tensors = {
            f"{layer}.{name}": tensor.contiguous().cpu()
            for layer, statistics in self.layers.items()
            for name, tensor in vars(statistics).items()
            if tensor is not None
        }
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.unfinished")
        try:
            save_file(tensors, unfinished, metadata={"format": _FORMAT, "tokens": str(self.tokens)})
            os.replace(unfinished, path)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, layers: Sequence[int] | None = None) -> Statistics:
        """Read what `save` wrote; the tensors come to the CPU.

        The file is mapped into memory, and read from the disk as far as the tensors are looked at.

        Args:
            path: the file.
            layers: read those of these layers that are there; None means all.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not one that `save` wrote.
        """
        found: dict[int, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no calibration statistics of this version of gluprune")
                for key in file.keys():  # noqa: SIM118 (a file, no dict)
                    layer, name = key.split(".")
                    if layers is None or int(layer) in layers:
                        found.setdefault(int(layer), {})[name] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path} is no complete safetensors file: {error}") from None
        return cls({layer: LayerStatistics(**found[layer]) for layer in sorted(found)}, int(metadata["tokens"]))


def calibrate(
    model: nn.Module,
    calibration: Iterable,
    *,
    gram: bool = True,
    sensitivity: bool = False,
    layers: Sequence[int] | None = None,
) -> Statistics:
    """Collect the statistics of several layers in one pass over the calibration data.

    Everything is held in memory at once: `4 * I^2` bytes a layer with the Gram matrix (9 MB at I = 1536, 268 MB at
    I = 8192). Where that is too much give `prune` the calibration data itself, which then works through the layers in
    several passes, or collect some `layers` at a time.

    Args:
        model: a Hugging Face causal LM of a supported family, patched or not. Left as it was.
        calibration: an iterable of batches: int tensors of token ids `[B, S]`, dicts with `input_ids` and maybe
            `attention_mask` `[B, S]` (0 is padding and left out), or tuples of these two. A DataLoader is such a thing.
        gram: whether to collect the Gram matrices, which `compensate=True` needs. Decoder layers on a CPU
            then run in float32 whatever their dtype; without, the model runs as it is.
        sensitivity: whether to find out by a backward pass over some of the text what the loss makes of it that
            neurons go, which `score="surgeon"` and `allocation="sensitivity"` need. First, that takes `4 * H^2` bytes
            a layer and `I + H` activations and gradients of about 4096 tokens, with all activations and several times
            the logits of one row, and on a CPU a float32 copy of a model in half precision; beside the Gram matrices
            then what it takes a layer, and `32 * I^2` bytes, or `4 * I * (I + 16384)` where that is more.
        layers: layer indices; None means all.

    Returns:
        The `Statistics`, float32, on the devices of the layers.

    Raises:
        TypeError, ValueError: no batches, no tokens, a batch of another kind or shape, a token id that the model does
            not know, NaN or Inf in the activations or gradients (names the layer), or `sensitivity` without `gram` or
            for a model without a language-model head.
    """
    if sensitivity and not gram:
        raise ValueError("sensitivity=True needs gram=True")
    glus = model_glus(model)
    layers = range(len(glus)) if layers is None else layers
    if not layers or not all(index in range(len(glus)) for index in layers):
        raise ValueError(f"layers must hold indices from 0 to {len(glus) - 1}, got {list(layers)}")
    batches = read_batches(model, calibration)
    gradients = _output_gradients(model, batches, layers) if sensitivity else None
    return _collect(model, glus, layers, batches, gram, gradients, "calibrating")


def calibrate_in_passes(
    model: nn.Module, calibration: Iterable, *, gram: bool, sensitivity: bool, layers: Sequence[int]
) -> Iterator[tuple[int, LayerStatistics]]:
    """The statistics of every layer in turn, held for as many layers at a time as fit into memory.

    Arguments and errors are those of `calibrate`. On every device the Gram matrices may take half of the memory that is
    free at the start; where they would take more, the calibration data is run through the model several times. On a CPU
    one decoder layer at a time takes a float32 copy of its weights. `sensitivity` takes what `calibrate` says of it.

    Yields:
        Layer index and statistics, in the order of `layers`.
    """
    glus = model_glus(model)
    batches = read_batches(model, calibration)
    gradients = _output_gradients(model, batches, layers) if sensitivity else None
    passes = [list(layers)]
    if gram:
        downs = [(index, glus[index].down.weight) for index in layers]
        passes = plan_passes([(index, down.device, 4 * down.shape[1] ** 2) for index, down in downs])
    for number, group in enumerate(passes, 1):
        label = "calibrating" if len(passes) == 1 else f"calibrating, pass {number} of {len(passes)}"
        found = _collect(model, glus, group, batches, gram, gradients, label).layers
        for index in group:
            yield index, found.pop(index)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def plan_passes(sizes: Sequence[tuple[int, torch.device, int]]) -> list[list[int]]:
    """Divide layers into passes, in order, so that each pass takes at most half of the free memory of every device.

    Args:
        sizes: of every layer its index, its device and the bytes it takes there.

    Returns:
        The layer indices of each pass; a layer that is too large for its device has a pass of its own.
    """
    budgets = {device: free_memory(device) // 2 for device in {device for _, device, _ in sizes}}
    passes: list[list[int]] = []
    left: dict[torch.device, int] = {}
    for index, device, size in sizes:
        if not passes or size > left[device]:
            passes.append([])
            left = dict(budgets)
        passes[-1].append(index)
        left[device] -= size
    return passes


def read_batches(model: nn.Module, calibration: Iterable) -> list[Batch]:
    """All batches as token ids `[B, S]` and mask (bool `[B, S]`, True is a token; None where all are), checked.

    Raises:
        TypeError, ValueError: see `calibrate`.
    """
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be an iterable of batches, got {type(calibration).__name__}")
    vocabulary = model.get_input_embeddings().num_embeddings
    batches = []
    for number, batch in enumerate(calibration):
        ids, mask = _read_batch(batch, f"calibration batch {number}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"calibration batch {number} has token ids from {int(ids.min())} to {int(ids.max())};"
                f" the model knows 0 to {vocabulary - 1}"
            )
        if ids.numel() if mask is None else mask.any():
            batches.append((ids, mask))
    if not batches:
        raise ValueError("calibration holds no tokens: give at least one batch that is not all padding")
    return batches


def _read_batch(batch: object, label: str) -> Batch:
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise ValueError(f"{label} is a dict without input_ids: it has {', '.join(map(str, batch)) or 'nothing'}")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
    elif isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        ids, mask = batch if len(batch) == 2 else (*batch, None)
    else:
        ids, mask = batch, None
    if not isinstance(ids, torch.Tensor):
        found = type(ids).__name__
        raise TypeError(f"{label} must be a tensor, a dict with input_ids or a tuple (ids, mask), got {found}")
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        found = f"{ids.dtype} of shape {list(ids.shape)}"
        raise ValueError(f"{label} must hold integer token ids of shape [B, S], got {found}")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"the attention_mask of {label} must have the shape of its ids {list(ids.shape)}, got {found}")
    mask = None if mask is None or bool((mask != 0).all()) else mask != 0
    return ids, mask


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parents come before their children, whose own mode then holds
            if module.training != training:
                module.train(training)


@contextmanager
def in_float32(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Run decoder layers on a CPU in float32, each with a float32 copy of its weights that lives as long as its forward.

    Elsewhere layers run as they are.
    """
    originals: list[tuple[nn.Parameter, torch.Tensor]] = []

    def upcast(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        for parameter in layer.parameters():
            if is_half_on_cpu(parameter):
                originals.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
        if originals:
            args = args[0].float(), *args[1:]  # the hidden states
        return args, kwargs

    def restore(*_) -> None:
        while originals:
            parameter, data = originals.pop()
            parameter.data = data

    with ExitStack() as stack:
        stack.callback(restore)
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(upcast, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(restore).remove)
        yield


def _output_gradients(model: nn.Module, batches: list[Batch], layers: Sequence[int]) -> dict[int, LayerGradients]:
    if model.get_output_embeddings() is None:
        raise ValueError(f"sensitivity=True needs a model with a language-model head, {type(model).__name__} has none")
    with evaluating(model):
        return output_gradients(model, batches, layers)


def run_decoder(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Run a batch without the language-model head, whose logits would be the largest tensor of all."""
    decoder = getattr(model, model.base_model_prefix, model)
    device = model.get_input_embeddings().weight.device
    attention_mask = None if mask is None else mask.long().to(device)
    decoder(input_ids=ids.to(device), attention_mask=attention_mask, use_cache=False)


@torch.no_grad()
def _collect(
    model: nn.Module,
    glus: list[GLU],
    layers: Sequence[int],
    batches: list[Batch],
    gram: bool,
    gradients: Mapping[int, LayerGradients] | None,
    label: str,
) -> Statistics:
    """One pass. With `gradients`, of `output_gradients`, sensitivities are found, too."""
    found = {index: LayerStatistics.empty(glus[index], gram) for index in layers}
    mask: torch.Tensor | None = None

    def taking_into(statistics: LayerStatistics):
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2)  # [B * S, I]
            statistics.add(x if mask is None else x[mask.flatten().to(x.device)])

        return hook

    tokens = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if gram:
            stack.enter_context(in_float32(decoder_layers(model)))
        for index, statistics in found.items():
            handle = glus[index].down.register_forward_pre_hook(taking_into(statistics))
            stack.callback(handle.remove)
        for number, (ids, mask) in enumerate(tqdm(batches, desc=label, unit="batch", disable=None, leave=False)):
            run_decoder(model, ids, mask)
            tokens += ids.numel() if mask is None else int(mask.sum())
            for index, statistics in found.items():
                if not statistics.squares.isfinite().all():
                    raise ValueError(f"layer {index} has NaN or Inf in its activations on calibration batch {number}")
    for statistics in found.values():
        statistics.complete()
    if gradients is not None:
        for index, statistics in tqdm(found.items(), desc="sensitivities", unit="layer", disable=None, leave=False):
            down = glus[index].down.weight.detach()
            statistics.saliency = saliencies(down, statistics.gram, gradients[index], tokens)
            statistics.costs = narrowing_costs(down, statistics.gram, gradients[index], statistics.saliency)
    widest = max(glus[index].intermediate_size for index in layers)
    if gram and tokens < widest:
        logger.warning("%d calibration tokens for %d neurons: the Gram matrices are singular", tokens, widest)
    return Statistics(found, tokens)


def batches_from_text(
    tokenizer, text: str | Sequence[str], windows: int = 128, length: int = 512, batch_size: int = 4
) -> list[torch.Tensor]:
    """Cut windows, evenly spread over a text, into calibration batches.

    Args:
        tokenizer: a Hugging Face tokenizer; no special tokens are added.
        text: any length, or several texts; one too short for so many windows gives as many as it has.
        windows: how many of each text.
        length: tokens a window.
        batch_size: windows a batch.

    Returns:
        int64 tensors `[batch_size, length]`, the last may have fewer rows.

    Raises:
        ValueError: a text is shorter than one window, or there is none, or a number below 1.
    """
    for name, value in {"windows": windows, "length": length, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    texts = [text] if isinstance(text, str) else text
    if not texts:
        raise ValueError("give at least one calibration text")
    rows = []
    for number, content in enumerate(texts, 1):
        ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False).input_ids)
        available = ids.numel() // length
        if not available:
            label = "the calibration text" if len(texts) == 1 else f"calibration text {number} of {len(texts)}"
            raise ValueError(f"{label} has {ids.numel()} tokens: one window takes {length}")
        chosen = torch.arange(min(windows, available)) * available // min(windows, available)
        rows.append(ids[: available * length].view(available, length)[chosen])
    return list(torch.cat(rows).split(batch_size))
