"""Bring a pruned model back towards the dense one, layer after layer, by least squares on text.

What one narrowed layer gets wrong the next ones pass on, and all get their inputs from what came before. So layers are
taken in order. With h `[T, H]` the residual stream of the dense model behind a layer, h' that of the pruned model, whose
earlier layers have been dealt with already, and X `[T, width]` the inputs of the pruned layer's down projection, its
weight W `[width, H]` is moved by

    D = argmin ||(h - h') - X D||^2 + lambda ||D||^2,

so a layer makes up for all that went wrong up to it: *Channel Pruning for Accelerating Very Deep Neural Networks* (He et
al., arXiv 1707.06168), section 3.2, where layers are pruned in order, and 3.3, where the last layer of a residual branch
aims at what the shortcut lacks, too. No gradient step is taken.

Little of h - h' follows from X, and D has many entries: fitted on few tokens it makes the model worse. So D is shrunk by a
factor for the layer, which is found by cross-fitting. Let D_a be fitted on one half of the rows of text and D_b on the
other. On the half that it has not seen, D_a is best multiplied by

    s = S / (S + N) = <X_b D_a, h_b - h'_b> / ||X_b D_a||^2,

with S the squares of what there is to find and N those of the noise of the fit; the sums run over both halves and exchange
them. A fit on all of the text has half of that noise at most, so it is multiplied by S / (S + N / 2) = 2 s / (1 + s).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from tqdm.auto import tqdm

from gluprune.calibration import LayerStatistics, evaluating, in_float32, read_batches
from gluprune.compensate import RIDGE, replace_down, solve
from gluprune.families import GLU, decoder_layers, family_of, model_glus
from gluprune.pruning import check_prunable
from gluprune.sensitivity import Batch

logger = logging.getLogger(__name__)


class _Stream:
    """The residual stream of one model, for every batch, which goes forward by one layer at a time.

    hidden: of every batch `[B, S, H]`.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]):
        self._layers = decoder_layers(model)
        self._calls = [_layer_calls(model, batch) for batch in batches]
        self.hidden = [calls[0][0][0] for calls in self._calls]

    def advance(self, batch: int, index: int) -> torch.Tensor:
        """Run layer `index` on a batch."""
        (_, *arguments), options = self._calls[batch][index]
        self.hidden[batch] = self._layers[index](self.hidden[batch], *arguments, **options)
        return self.hidden[batch]


def _layer_calls(model: nn.Module, batch: Batch) -> list[tuple[tuple, dict]]:
    """What each decoder layer is called with on a batch; the layers, which this does not run, would change the first alone."""
    calls = []

    def record(hidden: torch.Tensor, *arguments, **options) -> torch.Tensor:
        calls.append(((hidden, *arguments), options))
        return hidden

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.callback(_restore_forward, layer, vars(layer).get("forward"))
            layer.forward = record
        ids, mask = batch
        device = model.get_input_embeddings().weight.device
        decoder = getattr(model, model.base_model_prefix, model)
        attention_mask = None if mask is None else mask.long().to(device)
        decoder(input_ids=ids.to(device), attention_mask=attention_mask, use_cache=False)
    return calls


def _restore_forward(layer: nn.Module, own: object) -> None:
    """Give a module the forward back that it had of its own, or that of its class."""
    del layer.forward
    if own is not None:
        layer.forward = own


class _Sums:
    """Sums over tokens that least squares needs: X^T X and X^T E."""

    def __init__(self, glu: GLU):
        self._statistics = LayerStatistics.empty(glu, gram=True)
        self.cross = torch.zeros(glu.intermediate_size, glu.hidden_size, device=glu.down.weight.device)

    @property
    def gram(self) -> torch.Tensor:
        return self._statistics.gram

    def add(self, x: torch.Tensor, e: torch.Tensor) -> None:
        """Take in x `[T, width]` and float32 e `[T, H]`. The sums are valid only after `complete`."""
        self._statistics.add(x)
        self.cross.addmm_(x.float().T, e)

    def complete(self) -> None:
        self._statistics.complete()


def _change(halves: Sequence[_Sums], label: str) -> tuple[torch.Tensor, float]:
    """The shrunk D `[width, H]` from the sums of either half of the text, and its factor."""
    a, b = halves
    gram, cross = a.gram + b.gram, a.cross + b.cross
    fits = [
        solve(g, c, RIDGE * g.diagonal().mean(), label)
        for g, c in ((gram, cross), *((h.gram, h.cross) for h in halves))
    ]
    if any(fit is None for fit in fits):
        logger.warning("%s: the Gram matrix is singular whatever the ridge; its weights are kept as they were", label)
        return torch.zeros_like(cross), 0.0
    change, by_a, by_b = fits
    explained = (by_a * b.cross).sum(dtype=torch.float64) + (by_b * a.cross).sum(dtype=torch.float64)
    power = (by_a * (b.gram @ by_a)).sum(dtype=torch.float64) + (by_b * (a.gram @ by_b)).sum(dtype=torch.float64)
    share = float((explained / power).clamp(0, 1)) if power > 0 else 0.0
    factor = 2 * share / (1 + share)
    return factor * change, factor


def _check(pruned: nn.Module, dense: nn.Module) -> list[GLU]:
    """The GLUs of the pruned model, after refusing what cannot be reconstructed."""
    glus, dense_glus = model_glus(pruned), model_glus(dense)
    family, dense_family = family_of(pruned.config), family_of(dense.config)
    if family != dense_family or len(glus) != len(dense_glus) or glus[0].hidden_size != dense_glus[0].hidden_size:
        found, other = (
            f"{model.config.get_text_config().model_type} with {len(layers)} layers of hidden size {layers[0].hidden_size}"
            for model, layers in ((pruned, glus), (dense, dense_glus))
        )
        raise ValueError(f"pruned must be dense with narrower MLPs; pruned is {found}, dense is {other}")
    if family.normalized:
        raise ValueError(
            f"model type {pruned.config.get_text_config().model_type!r} cannot be reconstructed: a norm comes between its"
            " down projections and the residual stream"
        )
    check_prunable(pruned, glus, range(len(glus)))
    return glus


@torch.no_grad()
def reconstruct(pruned: nn.Module, dense: nn.Module, calibration: Iterable) -> None:
    """Re-solve the down projections of a pruned model in order, so that its residual stream follows the dense model's.

    It works after pruning of any kind and on layers of any widths, on top of `compensate=True` best. The text may be
    much less than a calibration pass takes; more does better. In place, all or nothing: Parameter objects stay the same,
    and if anything fails every weight is as it was.

    Memory: the residual streams of both models over all of the text, `8 * T * H` bytes where layers run in float32, the
    inputs of one down projection, and three Gram matrices `[width, width]` in float32. As in `calibrate`, decoder layers
    in half precision run in float32 on a CPU.

    Args:
        pruned: a causal LM of a family whose MLPs write into the residual stream directly: not olmo2, gemma2, gemma3_text
            and glm4, which normalise. Patched or not.
        dense: the model that it was, on any device. Left as it was.
        calibration: batches of text as `calibrate` takes them, with two rows at least.

    Raises:
        TypeError, ValueError: unusable batches, as for `calibrate`, or a single row of text; models that do not belong
            together or of another family; NaN or Inf in the residual streams (names the layer).
    """
    glus = _check(pruned, dense)
    batches = read_batches(pruned, calibration)
    if sum(len(ids) for ids, _ in batches) < 2:
        raise ValueError("calibration holds one row of text: give at least two, each is to check the other")
    layers = decoder_layers(pruned)
    inputs: list[torch.Tensor] = []

    def take(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.append(arguments[0].detach())

    with ExitStack() as stack, ExitStack() as undo:
        for model in (pruned, dense):
            stack.enter_context(evaluating(model))
            stack.enter_context(in_float32(decoder_layers(model)))
        aim, stream = _Stream(dense, batches), _Stream(pruned, batches)
        for index, glu in enumerate(tqdm(glus, desc="reconstructing", unit="layer", disable=None, leave=False)):
            label, weight = f"layer {index}", glu.down.weight.data
            # Granite scales what its MLPs write.
            scale = getattr(layers[index], "residual_multiplier", 1.0)
            halves, rows = (_Sums(glu), _Sums(glu)), 0
            inputs.clear()
            handle = glu.down.register_forward_pre_hook(take)
            stack.callback(handle.remove)
            for number, (ids, mask) in enumerate(batches):
                wanted = aim.advance(number, index)
                found = stream.advance(number, index)
                missing = (wanted.to(found.device).float() - found.float()) / scale  # [B, S, H]
                x = inputs[-1]  # [B, S, width]
                for parity, half in enumerate(halves):
                    chosen = slice((parity - rows) % 2, None, 2)
                    here = slice(None) if mask is None else mask[chosen].to(x.device)
                    half.add(x[chosen][here].flatten(0, -2), missing[chosen][here].flatten(0, -2))
                rows += len(ids)
            handle.remove()
            for half in halves:
                half.complete()
            if not all(half.gram.isfinite().all() and half.cross.isfinite().all() for half in halves):
                raise ValueError(f"{label} has NaN or Inf in its activations on the calibration text")
            change, factor = _change(halves, label)
            logger.info("%s: correction multiplied by %.2f", label, factor)
            corrected = (weight.float() + change.T).to(weight.dtype)
            replace_down(glu.down, corrected, undo)
            moved = scale * (corrected.float() - weight.float()).T  # [width, H], as rounded
            for number, x in enumerate(inputs):
                stream.hidden[number] += (x.float() @ moved).to(stream.hidden[number].dtype)
        undo.pop_all()
    for glu in glus:  # a patched MLP moves its new weights into aligned storage when its mode is set
        glu.mlp.train(glu.mlp.training)
