"""`calibrate`: run text through a model and collect the statistics of its neurons."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gluprune.calibration.batches import Batch, read_batches, token_count
from gluprune.calibration.running import as_written, check_ran, in_float32, run_decoder
from gluprune.calibration.sensitivity import (
    LayerGradients,
    narrowing_costs,
    output_gradients,
    removed_counts,
    saliencies,
)
from gluprune.calibration.statistics import LayerStatistics, Statistics, first_weights, write_statistics
from gluprune.io.memory import available_memory
from gluprune.io.progress import progress
from gluprune.models.glu import GLU, check_head, decoder_layers, model_glus
from gluprune.models.widths import check_layers
from gluprune.models.wrappers import check_weights, unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_LEAST_TOKENS = 4  # for each neuron


def calibrate(
    model: PreTrainedModel,
    calibration: Iterable,
    *,
    gram: bool = True,
    sensitivity: bool = False,
    layers: Sequence[int] | None = None,
) -> Statistics:
    """Collect the statistics of several layers in one pass over the calibration data.

    All layers are held in memory at once: `4 * I^2` bytes per layer with the Gram matrix (9 MB at I = 1536, 268 MB at
    I = 8192). If that is too much, pass the calibration data itself to `prune`, which then works through the layers in
    several passes, or collect some `layers` at a time.

    Args:
        model: A Hugging Face causal LM of a supported family, patched or not. It is not changed.
        calibration: An iterable of batches, such as a DataLoader: int tensors of token ids `[B, S]`, dicts with
            `input_ids` and optionally `attention_mask` `[B, S]` (0 is padding and ignored), or tuples of these two.
            Of a dict, `labels` and columns of the data set are not used; inputs other than text are an error.
        gram: Whether to collect the Gram matrices, which `compensate=True` needs. Decoder layers in half precision on a
            CPU then run in float32.
        sensitivity: Whether to measure, by backward passes over some of the text, how much the loss rises when neurons
            are removed; `score="surgeon"` and `allocation="sensitivity"` need this. The backward passes take
            `4 * H^2` bytes per layer, `I + H` activations and gradients of about 4096 tokens, all activations and
            several times the logits of one row, and on a CPU a float32 copy of a model in half precision. After them,
            besides the Gram matrices, this takes `32 * I^2` bytes, or `4 * I * (I + 16384)` if that is more.
        layers: Layer indices; None means all.

    Returns:
        The `Statistics`, float32, on the devices of the layers.

    Raises:
        TypeError: `calibration` or a batch has the wrong type.
        ValueError: No batches, no tokens, a batch of the wrong shape or with inputs that are not passed on
            (`position_ids`, `pixel_values`), a token id outside the vocabulary, NaN or Inf in the activations or
            gradients (names the layer), or `sensitivity` without `gram` or for a model without a language-model head.

    Example:
        >>> import gluprune
        >>> from transformers import AutoTokenizer
        >>> model, tokenizer = gluprune.load(model_path), AutoTokenizer.from_pretrained(model_path)
        >>> batches = gluprune.batches_from_text(tokenizer, "A long text. " * 100, windows=2, length=64)
        >>> statistics = gluprune.calibrate(model, batches, sensitivity=True)
        >>> report = gluprune.prune(
        ...     model, pruning_ratio=0.2, score="surgeon", multiple_of=1, compensate=True, calibration=statistics
        ... )
    """
    if sensitivity and not gram:
        raise ValueError("sensitivity=True needs gram=True")
    model = unwrapped(model)
    glus = model_glus(model)
    check_weights(model)
    indices = check_layers(layers, len(glus))
    batches = read_batches(model, calibration)
    gradients = _output_gradients(model, batches, indices) if sensitivity else None
    return _Pass(model, glus, batches, gram=gram, gradients=gradients).collect(indices, "calibrating")


def calibrate_in_passes(
    model: PreTrainedModel, calibration: Iterable, *, gram: bool, sensitivity: bool, layers: Sequence[int]
) -> Iterator[tuple[int, LayerStatistics]]:
    """Yield the statistics of one layer after the other, held for as many layers at a time as fit into memory.

    The Gram matrices may take half of the memory that is free at the start, on every device. If they would take more,
    the calibration data runs through the model several times. On a CPU, one decoder layer at a time takes a float32
    copy of its weights. For arguments, errors and the memory of `sensitivity` see `calibrate`.

    Yields:
        Layer index and statistics, in the order of `layers`.
    """
    glus = model_glus(model)
    check_weights(model)
    batches = read_batches(model, calibration)
    gradients = _output_gradients(model, batches, layers) if sensitivity else None
    passes = [list(layers)]
    if gram:
        downs = [(index, glus[index].down.weight) for index in layers]
        passes = plan_passes([(index, down.device, 4 * down.shape[1] ** 2) for index, down in downs])
    one_pass = _Pass(model, glus, batches, gram=gram, gradients=gradients)
    for number, group in enumerate(passes, 1):
        label = "calibrating" if len(passes) == 1 else f"calibrating, pass {number} of {len(passes)}"
        found = one_pass.collect(group, label).layers
        for index in group:
            yield index, found.pop(index)


def calibrate_to_file(
    model: PreTrainedModel,
    calibration: Iterable,
    path: Path,
    *,
    gram: bool = False,
    sensitivity: bool = False,
    texts: Mapping[str, str],
) -> int:
    """Write the statistics of all layers to a file, in as many passes as the memory needs; return the tokens.

    The file equals that of `calibrate` and `Statistics.save`. For arguments, errors and memory see
    `calibrate_in_passes`, for `texts` see `Statistics`.
    """
    gram = gram or sensitivity
    batches = read_batches(model, calibration)
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for index, glu in enumerate(model_glus(model)):
        size = glu.intermediate_size
        shapes[index] = {"squares": (size,), "batch_norms": (size,)}
        if gram:
            shapes[index]["gram"] = (size, size)
        if sensitivity:
            shapes[index] |= {"saliency": (size,), "costs": (len(removed_counts(size)),)}
        shapes[index]["weights"] = first_weights(glu.down.weight).shape
    layers = calibrate_in_passes(model, batches, gram=gram, sensitivity=sensitivity, layers=list(shapes))
    tokens = sum(map(token_count, batches))
    write_statistics(path, shapes, layers, tokens=tokens, texts=texts)
    return tokens


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def plan_passes(sizes: Sequence[tuple[int, torch.device, int]]) -> list[list[int]]:
    """Divide layers into passes, in order, so that each pass takes at most half of the free memory of every device.

    Args:
        sizes: Index, device and bytes of every layer.

    Returns:
        The layer indices of each pass. A layer that is too large for its device gets a pass to itself.
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


def _output_gradients(model: PreTrainedModel, batches: list[Batch], layers: Sequence[int]) -> dict[int, LayerGradients]:
    check_head(model, "sensitivity=True")
    with as_written(model):
        return output_gradients(model, batches, layers)


class _Pass:
    """A pass over all batches that collects the statistics of some layers.

    With `gradients`, from `output_gradients`, the statistics include sensitivities.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        glus: list[GLU],
        batches: list[Batch],
        *,
        gram: bool,
        gradients: Mapping[int, LayerGradients] | None,
    ):
        self._model, self._glus, self._batches = model, glus, batches
        self._gram, self._gradients = gram, gradients
        self._mask: torch.Tensor | None = None  # of the batch that is running
        self._ran: set[int] = set()  # the statistics that got tokens

    @torch.no_grad()
    def collect(self, layers: Sequence[int], label: str) -> Statistics:
        found = {index: LayerStatistics.empty(self._glus[index], gram=self._gram) for index in layers}
        with ExitStack() as stack:
            stack.enter_context(as_written(self._model))
            if self._gram:
                stack.enter_context(in_float32(decoder_layers(self._model)))
            for index, statistics in found.items():
                handle = self._glus[index].down.register_forward_pre_hook(self._adding_to(statistics))
                stack.callback(handle.remove)
            self._run(found, label)
        for statistics in found.values():
            statistics.complete()
        tokens = sum(map(token_count, self._batches))
        if self._gradients is not None:
            self._add_sensitivities(found, self._gradients, tokens)
        widest = max(self._glus[index].intermediate_size for index in layers)
        if self._gram and tokens < _LEAST_TOKENS * widest:
            logger.warning(
                "%d calibration tokens are too few for the %d neurons of a layer: give at least %d, better many more",
                tokens,
                widest,
                _LEAST_TOKENS * widest,
            )
        return Statistics(found, tokens)

    def _adding_to(self, statistics: LayerStatistics):
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2)  # [B * S, I]
            statistics.add(x if self._mask is None else x[self._mask.flatten().to(x.device)])
            self._ran.add(id(statistics))

        return hook

    def _run(self, found: dict[int, LayerStatistics], label: str) -> None:
        for number, (ids, mask) in enumerate(progress(self._batches, desc=label, unit="batch")):
            self._mask = mask
            run_decoder(self._model, ids, mask)
            for index, statistics in found.items():
                check_ran(index, id(statistics) in self._ran)
                if not statistics.squares.isfinite().all():
                    raise ValueError(f"layer {index} has NaN or Inf in its activations on calibration batch {number}")

    def _add_sensitivities(
        self, found: dict[int, LayerStatistics], gradients: Mapping[int, LayerGradients], tokens: int
    ) -> None:
        for index, statistics in progress(found.items(), desc="sensitivities", unit="layer"):
            down, gram = self._glus[index].down.weight.detach(), statistics.gram
            assert gram is not None
            statistics.saliency = saliencies(down, gram, gradients[index], tokens)
            statistics.costs = narrowing_costs(down, gram, gradients[index], statistics.saliency)
