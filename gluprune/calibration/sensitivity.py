"""How much the loss of the model rises when neurons of one layer are removed: to choose neurons, and widths by layer.

A layer's down projection turns X `[T, I]` into Y = X W, W `[I, H]`. A change D of W changes the model's next-token
distribution by a divergence per token of about

    1/2 E[(x^T D g)^2],

with x `[I]` a token's row of X and g `[H]` the gradient, with respect to its row of Y, of -log p(y | text) summed
over the text, each y drawn from the model's next-token distribution. This is the second-order term with the Fisher
information in place of the Hessian, for independent tokens. It measures the cost of narrowing a layer. Neurons are
ranked by a further approximation, in which x and g are independent, too:

    1/2 tr(F D^T G D) / T,    G = X^T X,    F = E[g g^T],

as in *Optimizing Neural Networks with Kronecker-factored Approximate Curvature* (Martens and Grosse, arXiv 1503.05671,
section 3), with a correction per neuron. g comes from backward passes; no weight is changed and no gradient step taken.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gluprune.calibration.batches import Batch, token_count
from gluprune.calibration.least_squares import RIDGE, damped_cholesky
from gluprune.calibration.running import check_ran, is_half_on_cpu
from gluprune.io.progress import progress
from gluprune.models.glu import model_glus

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens in the backward passes, spread evenly over the calibration text: F and the coupling have few entries compared
# with G.
FISHER_TOKENS = 16_384
# Of these, tokens whose x and g are kept until the costs are computed.
_SAMPLE_TOKENS = 4096
# What is added to F's diagonal for the saliencies, as a share of its mean: F comes from one drawn label per token.
# This and _RIDGE were chosen on SmolLM2-135M among 0.1, 1, 10 and 0.01 to 1, on half of the windows that
# `gluprune_evals.quality` measures on, before the coupling was added.
_DAMPING = 1.0
# What is added to G's diagonal before it is inverted, as a share of a typical entry: a neuron that is silent on the
# calibration text, or predicted by others there, may matter on other text.
_RIDGE = 0.1
# Shares of a layer's neurons at whose removal the costs are computed: dense near 0, where costs rise slowly.
_REMOVED_SHARES = tuple((step / 16) ** 2 for step in range(16))


def removed_counts(size: int) -> list[int]:
    """Return the 16 numbers of removed neurons at which costs are computed, ascending from 0; small sizes repeat."""
    return [int(share * size) for share in _REMOVED_SHARES]


def _rows(batches: Sequence[Batch]) -> list[Batch]:
    """Return rows `[1, S]` of the batches and of their masks, evenly spread, with about `FISHER_TOKENS` tokens."""
    rows = [
        (ids[i : i + 1], None if mask is None else mask[i : i + 1]) for ids, mask in batches for i in range(len(ids))
    ]
    rows = list(filter(token_count, rows))
    count = max(1, min(len(rows), len(rows) * FISHER_TOKENS // sum(map(token_count, rows))))
    return [rows[i * len(rows) // count] for i in range(count)]


def _differentiable(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, or a float32 copy if it has half precision on a CPU."""
    return copy.deepcopy(model).float() if any(map(is_half_on_cpu, model.parameters())) else model


@dataclass
class LayerGradients:
    """What the backward passes collect for one layer's down projection, on the device of its weights.

    Attributes:
        fisher: float32 `[H, H]`, F, the mean over the tokens of g g^T.
        coupling: float32 `[I]`. For neuron i, with w_i `[H]` its column of `down`,
            E[x_i^2 (w_i^T g)^2] / (E[x_i^2] E[(w_i^T g)^2]): 1 if x_i and g are independent, large if the neuron is
            active on few tokens and the loss is sensitive to its output there; 1 if it is silent or its output is zero.
        x: `[T', I]`, of about `_SAMPLE_TOKENS` tokens, in the dtype of the backward pass.
        g: `[T', H]`, of the same tokens.
    """

    fisher: torch.Tensor
    coupling: torch.Tensor
    x: torch.Tensor
    g: torch.Tensor


class _Accumulator:
    """Sums over the tokens of one layer, and a sample of one in `step` tokens."""

    def __init__(self, down: nn.Linear, step: int):
        device, hidden_size, size = down.weight.device, down.out_features, down.in_features
        self._weight, self._step = down.weight.detach(), step
        self._fisher = torch.zeros(hidden_size, hidden_size, dtype=torch.float32, device=device)
        # Sums of x_i^2, of (w_i^T g)^2 and of their product.
        self._active, self._sensitive, self._joint = torch.zeros(3, size, dtype=torch.float32, device=device).unbind()
        self._sample: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def has_run(self) -> bool:
        """Whether anything was added."""
        return bool(self._sample)

    def add(self, x: torch.Tensor, g: torch.Tensor, row: int) -> None:
        """Add x `[S, I]` and g `[S, H]` of the tokens of row number `row`."""
        # The first sampled token differs from row to row. Without the copy, a slice would keep the whole row in memory.
        sampled = slice(row % self._step, None, self._step)
        self._sample.append((x[sampled].clone(), g[sampled].clone()))
        x, g = x.float(), g.float()
        self._fisher.addmm_(g.T, g)
        active, sensitive = x.square(), (g @ self._weight.float()).square()  # [S, I]
        self._active += active.sum(0)
        self._sensitive += sensitive.sum(0)
        self._joint += (active * sensitive).sum(0)

    def result(self, tokens: int) -> LayerGradients:
        """Return the means over all rows, which had `tokens` tokens. The accumulator is empty afterwards."""
        independent = self._active * self._sensitive
        coupling = torch.where(independent > 0, tokens * self._joint / independent, 1)
        sample, self._sample = self._sample, []
        return LayerGradients(self._fisher.div_(tokens), coupling, *map(torch.cat, zip(*sample, strict=True)))


def output_gradients(
    model: PreTrainedModel, batches: Sequence[Batch], layers: Sequence[int]
) -> dict[int, LayerGradients]:
    """Return the gradients g of the outputs of the down projections.

    The model runs forward and backward, one row of the batches at a time. On a CPU, a model in half precision is copied
    to float32 for this.

    Args:
        model: A causal LM in eval mode. It is not changed, and its parameters get no gradients.
        batches: Token ids `[B, S]` and masks `[B, S]` (True is a token) or None. Rows with about `FISHER_TOKENS` tokens
            are used, at least one.
        layers: Layer indices.

    Returns:
        Layer index -> `LayerGradients`.

    Raises:
        ValueError: A gradient is NaN or Inf (names the layer), or the logits are NaN.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        results = _BackwardPasses(_differentiable(model), _rows(batches), layers, stack).run()
    for index, gradients in results.items():
        if not gradients.fisher.isfinite().all():
            raise ValueError(f"layer {index} has NaN or Inf in its gradients on the calibration text")
    return results


class _BackwardPasses:
    """Backward passes over rows of text, with hooks on a model that `stack` removes."""

    def __init__(self, model: PreTrainedModel, rows: list[Batch], layers: Sequence[int], stack: ExitStack):
        self._model, self._rows = model, rows
        self._embedding: Any = model.get_input_embeddings()
        self._row, self._mask = 0, None  # those of the row that is running
        self._embedded: torch.Tensor | None = None
        stack.callback(self._embedding.register_forward_hook(self._start_graph).remove)
        step = max(1, sum(map(token_count, rows)) // _SAMPLE_TOKENS)
        glus = model_glus(model)
        self._accumulators = {index: _Accumulator(glus[index].down, step) for index in layers}
        for index, accumulator in self._accumulators.items():
            stack.callback(glus[index].down.register_forward_hook(self._adding_to(accumulator)).remove)

    def run(self) -> dict[int, LayerGradients]:
        tokens = 0
        generator = torch.Generator().manual_seed(0)
        device = self._embedding.weight.device
        for number, (row_ids, row_mask) in enumerate(progress(self._rows, desc="gradients", unit="row")):
            self._row = number
            # Autograd does not take tensors that were created in inference mode.
            ids, mask = row_ids.clone(), None if row_mask is None else row_mask.clone()
            self._mask = mask
            attention_mask = None if mask is None else mask.long().to(device)
            logits = self._model(input_ids=ids.to(device), attention_mask=attention_mask, use_cache=False).logits
            logits = (logits[0] if mask is None else logits[0, mask[0].to(logits.device)]).float()  # [T, V]
            probabilities = logits.detach().softmax(-1).cpu()  # sampled on the CPU: the same draws on every device
            if probabilities.isnan().any():
                raise ValueError("the logits are NaN on the calibration text")
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            loss.backward(inputs=[self._embedded])
            tokens += len(drawn)
            for index, accumulator in self._accumulators.items():
                check_ran(index, accumulator.has_run)
            del logits, loss  # frees the activations before those of the next row are computed
        return {index: accumulator.result(tokens) for index, accumulator in self._accumulators.items()}

    def _start_graph(self, module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
        self._embedded = output.detach().requires_grad_()
        return self._embedded

    def _adding_to(self, accumulator: _Accumulator):
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = arguments[0].detach()[0]  # [S, I]

            def add(gradient: torch.Tensor) -> None:
                kept = slice(None) if self._mask is None else self._mask[0].to(x.device)
                accumulator.add(x[kept], gradient[0, kept], self._row)

            output.register_hook(add)

        return hook


def saliencies(down: torch.Tensor, gram: torch.Tensor, gradients: LayerGradients, tokens: int) -> torch.Tensor:
    """Return, for every neuron, about how much the loss per token rises if it is removed and the others are refitted.

    With w_i `[H]` the neuron's column of `down`, this is w_i^T F w_i / (2 T [G^-1]_ii): the saliency of *Optimal Brain
    Surgeon* (Hassibi and Stork, 1993, eq. 5) for a whole column and factored curvature, as in *The LLM Surgeon* (van
    der Ouderaa et al., arXiv 2312.17244, section 3.2), which uses the labels of the text. F and G are damped first. The
    result is multiplied by the mean of 1 and the neuron's coupling: the coupling is estimated from few tokens, and it
    is that of the neuron itself, not of what remains of it after refitting.

    Args:
        down: `[H, I]`, any floating dtype.
        gram: float32 `[I, I]`, G over all tokens.
        gradients: Those of the layer.
        tokens: T, the number of tokens in G.

    Returns:
        float32 `[I]`.

    Raises:
        ValueError: The Gram matrix has NaN or Inf.
    """
    damped = gradients.fisher.clone()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
    written = (down.float() * (damped @ down.float())).sum(0)  # [I], w_i^T F w_i
    diagonal = gram.diagonal()
    # The median is zero if most neurons are silent on the text.
    lower = damped_cholesky(gram, _RIDGE * (diagonal.median() or diagonal.mean()))
    inverse = torch.cholesky_inverse(lower)
    return (written / inverse.diagonal()).float() * (1 + gradients.coupling) / (4 * tokens)


def narrowing_costs(
    down: torch.Tensor, gram: torch.Tensor, gradients: LayerGradients, saliency: torch.Tensor
) -> torch.Tensor:
    """Return about how much the loss per token rises if only this layer is narrowed and its down projection refitted.

    One factorisation serves every width. With the neurons sorted by saliency, S the kept ones, R the removed ones and
    L L^T = G + lambda I, refitting (`gluprune.pruning.compensate`) changes W by

        D_S = (G_SS + lambda I)^-1 G_SR W_R = L_SS^-T L_RS^T W_R,    D_R = -W_R,

    so with z = L^-1 x, the change of a token's loss is x^T D g = -(W_R g)^T L_RR z_R. It is summed up from the last
    neuron. The cost is the mean of 1/2 (x^T D g)^2 over the sample of tokens in `gradients`.

    Args:
        down: `[H, I]`, any floating dtype.
        gram: float32 `[I, I]`, G over all tokens.
        gradients: Those of the layer.
        saliency: float32 `[I]`; neurons of lowest saliency are removed first.

    Returns:
        float32 `[16]`: the cost of removing each of `removed_counts(I)` neurons; entry 0 is 0.

    Raises:
        ValueError: The Gram matrix has NaN or Inf.
    """
    order = saliency.argsort(descending=True)
    lower = damped_cholesky(gram[order][:, order], RIDGE * gram.diagonal().mean()).float()
    x, g = gradients.x.float()[:, order], gradients.g.float()  # [T', I], [T', H]
    z = torch.linalg.solve_triangular(lower, x.T, upper=False).T  # [T', I]
    written = g @ down.float()[:, order]  # [T', I], W g
    lost, costs = torch.zeros_like(x[:, 0]), []  # [T'], -x^T D g
    size = stop = down.shape[1]
    for removed in removed_counts(size):
        start = size - removed
        lost += (written[:, start:] @ lower[start:, start:stop] * z[:, start:stop]).sum(1)
        costs.append(lost.square().mean() / 2)
        stop = start
    return torch.stack(costs)
