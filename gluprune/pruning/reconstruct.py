"""Refit the down projections of a pruned model in order, so that every layer's output matches the dense model's.

The error of a narrowed layer passes through all later layers, so layers are refitted in order. Let h `[T, H]` be the
residual stream of the dense model after a layer, h' that of the pruned model, whose earlier layers have been refitted,
and X `[T, width]` the inputs of the pruned layer's down projection, all over the tokens of a text. The weight `[width,
H]` of the projection changes by

    D = argmin ||(h - h') - X D||^2 + lambda ||D||^2,

so a layer corrects all errors up to it, as in *Channel Pruning for Accelerating Very Deep Neural Networks* (He et al.,
arXiv 1707.06168): section 3.2, where layers are pruned in order, and 3.3, where the last layer of a residual branch
also corrects the error of the shortcut. No gradient step is taken. Where a constant or a norm comes between the
projection and the residual stream, it is taken into account (`gluprune.pruning.residual`).

X explains little of h - h', and D has many entries: fitted on few tokens it makes the model worse. So D is shrunk by a
factor per layer, which is estimated by cross-fitting. Let D_a be fitted on one half of the rows of text and D_b on the
other. On the half that D_a was not fitted on, the best factor for it is

    s = <X_b D_a, h_b - h'_b> / ||X_b D_a||^2,

an estimate of S / (S + N), with S the power of the signal and N that of the noise of the fit. Numerator and denominator
are summed over both assignments of the halves. A fit on all of the text has at most half of that noise, so it is
multiplied by S / (S + N / 2) = 2 s / (1 + s).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from gluprune.calibration.batches import Batch, read_batches, token_count
from gluprune.calibration.least_squares import RIDGE, solve
from gluprune.calibration.running import as_written, in_float32, run_decoder
from gluprune.calibration.statistics import LayerStatistics
from gluprune.io.progress import progress
from gluprune.models.glu import GLU, decoder_layers, model_glus
from gluprune.models.wrappers import check_weights, unwrapped
from gluprune.pruning.checks import check_prunable
from gluprune.pruning.compensate import replace_down
from gluprune.pruning.history import reconstruct_step, record
from gluprune.pruning.residual import path_of
from gluprune.runtime.patching import realign

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@torch.inference_mode(False)
@torch.no_grad()
def reconstruct(pruned: PreTrainedModel, dense: PreTrainedModel, calibration: Iterable) -> None:
    """Refit the down projections of a pruned model in order, so that every layer's output matches the dense model's.

    The method is that of *Channel Pruning for Accelerating Very Deep Neural Networks* (He et al., arXiv 1707.06168,
    sections 3.2 and 3.3), with steps shrunk by cross-fitting (`gluprune.pruning.reconstruct`). It works after
    any kind of pruning and for layers of any widths, best after `compensate=True`; the more was pruned, the more it
    helps. It needs much less text than calibration, of the same kinds; more is better. A layer for which the text shows
    no gain is left unchanged; the factors are logged. In place, all or nothing: Parameter objects stay the same, and if
    anything fails, every weight is restored.

    Memory: over all of the text, the residual streams of both models and the inputs of one down projection, in float32
    on a CPU and otherwise in the dtype of the model; the masks of all batches if there is padding; about five float32
    Gram matrices `[width, width]`; and the original down projections. As in `calibrate`, decoder layers in half
    precision run in float32 on a CPU.

    Args:
        pruned: A causal LM, patched or not.
        dense: The model before pruning, fully loaded, on any device. It is not changed.
        calibration: Batches as `calibrate` takes them, with at least two rows. Padding is left out.

    Raises:
        TypeError: Unusable batches, as for `calibrate`.
        ValueError: Unusable batches or fewer than two rows of text; models that do not belong together, share weights
            or are of another family; weights that `prune` rejects (quantized, on the meta device, tied); NaN or Inf in
            the residual streams (names the layer).

    Example:
        >>> import copy, gluprune
        >>> from transformers import AutoTokenizer
        >>> dense, tokenizer = gluprune.load(model_path), AutoTokenizer.from_pretrained(model_path)
        >>> batches = gluprune.batches_from_text(tokenizer, "A long text. " * 100, windows=2, length=64)
        >>> pruned = copy.deepcopy(dense)
        >>> report = gluprune.prune(pruned, pruning_ratio=0.25)
        >>> gluprune.reconstruct(pruned, dense, batches)
    """
    pruned, dense = unwrapped(pruned), unwrapped(dense)
    glus = _check(pruned, dense)
    batches = _without_padding_rows(read_batches(pruned, calibration))
    if sum(len(ids) for ids, _ in batches) < 2:
        raise ValueError(
            "calibration holds one row of text: give at least two, since the fit on one half is checked on the other"
        )
    with ExitStack() as stack, ExitStack() as undo:
        for model in (pruned, dense):
            stack.enter_context(as_written(model))
        target, stream = _Stream(dense, batches), _Stream(pruned, batches)
        for model in (pruned, dense):
            stack.enter_context(in_float32(decoder_layers(model)))
        for index, glu in enumerate(progress(glus, desc="reconstructing", unit="layer")):
            _refit_layer(index, glu, target, stream, undo)
        undo.pop_all()
    realign(glu.mlp for glu in glus)
    record(pruned, reconstruct_step(sum(map(token_count, batches))))


def _refit_layer(index: int, glu: GLU, target: _Stream, stream: _Stream, undo: ExitStack) -> None:
    """Advance both streams by one layer, and refit the down projection of that layer."""
    label, weight = f"layer {index}", glu.down.weight.data
    path = path_of(stream.layers[index], glu)
    halves, rows = (_Sums(glu), _Sums(glu)), 0
    inputs: list[torch.Tensor] = []  # of every batch x [B, S, width]
    outputs: list[torch.Tensor] = []  # of the latest batch y [B, S, H]

    def keep(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        inputs.append(arguments[0])
        outputs[:] = [output]

    with glu.down.register_forward_hook(keep):
        for number, (ids, mask) in enumerate(stream.batches):
            wanted, found = target.advance(number, index), stream.advance(number, index)
            error = wanted.to(found.device).float() - found.float()  # [B, S, H]
            data = path.problem(inputs[-1], outputs[0], error)
            for parity, half in enumerate(halves):  # rows take turns
                chosen = slice((parity - rows) % 2, None, 2)
                tokens = slice(None) if mask is None else mask[chosen].to(found.device)
                x, e = (values[chosen][tokens] for values in data)
                half.add(x.reshape(-1, x.shape[-1]), e.reshape(-1, e.shape[-1]))
            rows += len(ids)
    for half in halves:
        half.complete()
    if not all(half.gram.isfinite().all() and half.cross.isfinite().all() for half in halves):
        raise ValueError(f"{label} of pruned or dense has NaN or Inf in its activations on the text")
    change, factor = _shrunk_fit(*halves, label, path.squares)
    logger.info("%s: correction multiplied by %.2f", label, factor)
    if factor == 0:
        return
    replace_down(glu.down, (weight + change.T).to(weight.dtype), undo)
    bias = None if glu.down.bias is None else glu.down.bias.float()
    for number, x in enumerate(inputs):
        before, after = (
            path.added(F.linear(x.float(), matrix.float(), bias)) for matrix in (weight, glu.down.weight.data)
        )
        stream.hidden[number] += (after - before).to(stream.hidden[number].dtype)


def _check(pruned: PreTrainedModel, dense: PreTrainedModel) -> list[GLU]:
    """Return the GLUs of the pruned model, or raise if it cannot be reconstructed."""
    glus, dense_glus = model_glus(pruned), model_glus(dense)
    config, dense_config = pruned.config.get_text_config(), dense.config.get_text_config()
    vocabularies = [model.get_input_embeddings().num_embeddings for model in (pruned, dense)]
    found, expected = (
        f"{settings.model_type} with {len(layers)} layers, hidden size {settings.hidden_size}, {vocabulary} tokens"
        for settings, layers, vocabulary in zip((config, dense_config), (glus, dense_glus), vocabularies, strict=True)
    )
    if found != expected:
        raise ValueError(f"pruned must be dense with narrower MLPs; pruned is {found}; dense is {expected}")
    check_prunable(pruned, glus, range(len(glus)))
    check_weights(pruned)
    if any(parameter.is_meta for parameter in dense.parameters()):
        raise ValueError("dense is on the meta device: load its weights first")
    for index, (glu, other) in enumerate(zip(glus, dense_glus, strict=True)):
        if glu.down.weight is other.down.weight:
            raise ValueError(
                f"pruned and dense share the weights of layer {index}: dense must be the model before pruning"
            )
        if glu.down.in_features > other.down.in_features:
            widths = f"{glu.down.in_features} neurons in pruned, {other.down.in_features} in dense"
            raise ValueError(f"layer {index} has {widths}: give the pruned model first and the dense model second")
    return glus


def _without_padding_rows(batches: Iterable[Batch]) -> list[Batch]:
    """Return the batches without rows that are all padding."""
    return [(ids, None) if mask is None else (ids[mask.any(1)], mask[mask.any(1)]) for ids, mask in batches]


class _Stream:
    """The residual stream of one model for every batch, which advances one layer at a time.

    Attributes:
        layers: The decoder layers.
        batches: Token ids and masks.
        hidden: For every batch, the residual stream `[B, S, H]`.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]):
        self.layers, self.batches = decoder_layers(model), batches
        self.hidden: list[torch.Tensor] = []
        self._arguments: list[list[tuple[tuple, dict]]] = []
        for batch in batches:
            hidden, arguments = _layer_arguments(model, batch)
            self.hidden.append(hidden)
            self._arguments.append(arguments)

    def advance(self, batch: int, index: int) -> torch.Tensor:
        """Run layer `index` on a batch, and return its output `[B, S, H]`."""
        arguments, options = self._arguments[batch][index]
        self.hidden[batch] = self.layers[index](self.hidden[batch], *arguments, **options)
        return self.hidden[batch]


def _layer_arguments(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, list[tuple[tuple, dict]]]:
    """Return the hidden states `[B, S, H]` before the first layer, and the other arguments of each layer.

    The layers do not run: masks and positions do not depend on them.
    """
    first, found = [], []

    def record(hidden: torch.Tensor, *arguments, **options) -> torch.Tensor:
        first[:] = [hidden]
        found.append((arguments, options))
        return hidden

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.callback(_restore_forward, layer, vars(layer).get("forward"))
            setattr(layer, "forward", record)  # noqa: B010 (an instance attribute, not the method)
        run_decoder(model, *batch)
    if len(found) != len(decoder_layers(model)):
        raise ValueError(f"{type(model).__name__} cannot be reconstructed: it has layers that do not run on text")
    return first[0], found


def _restore_forward(layer: nn.Module, own: object) -> None:
    """Remove the forward from an instance, or restore the one that it had."""
    del layer.forward
    if own is not None:
        setattr(layer, "forward", own)  # noqa: B010 (an instance attribute, not the method)


class _Sums:
    """Sums over tokens for least squares: X^T X `[width, width]` and X^T E `[width, H]`, float32."""

    def __init__(self, glu: GLU):
        self._statistics = LayerStatistics.empty(glu, gram=True)
        shape = glu.intermediate_size, glu.hidden_size
        self.cross = torch.zeros(shape, dtype=torch.float32, device=glu.down.weight.device)

    @property
    def gram(self) -> torch.Tensor:
        gram = self._statistics.gram
        assert gram is not None
        return gram

    def add(self, x: torch.Tensor, e: torch.Tensor) -> None:
        """Add x `[T, width]` and float32 e `[T, H]`. The sums are valid only after `complete`."""
        self._statistics.add(x)
        self.cross.addmm_(x.float().T, e)

    def complete(self) -> None:
        self._statistics.complete()


def _shrunk_fit(a: _Sums, b: _Sums, label: str, squares: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, float]:
    """Return D `[width, H]` times its factor, and the factor, computed from the sums of both halves of the text.

    Args:
        a: The sums of one half.
        b: The sums of the other.
        label: Names the layer in the log.
        squares: Weights of the channels' squared errors for the factor, `[H]` or one number.
    """

    def fit(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor | None:
        return solve(gram, cross, RIDGE * gram.diagonal().mean(), label)

    on_all, on_a, on_b = fit(a.gram + b.gram, a.cross + b.cross), fit(a.gram, a.cross), fit(b.gram, b.cross)
    if on_all is None or on_a is None or on_b is None:
        return torch.zeros_like(a.cross), 0.0
    explained = (squares * (on_a * b.cross + on_b * a.cross)).sum(dtype=torch.float64)
    power = (squares * (on_a * (b.gram @ on_a) + on_b * (a.gram @ on_b))).sum(dtype=torch.float64)
    share = float((explained / power).clamp(0, 1)) if power > 0 else 0.0
    factor = 2 * share / (1 + share)
    return factor * on_all, factor
