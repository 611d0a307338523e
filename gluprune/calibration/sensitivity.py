"""What it costs the whole model, by its loss, that neurons of one layer go: to choose neurons, and widths by layer.

A layer's down projection turns X `[T, I]` into Y = X W, W `[I, H]`. A change D of W moves the model away from what it
was by a divergence of about

    1/2 E[(x^T D g)^2]

a token, with x `[I]` a token's row of X and g `[H]` the gradient, with respect to its row of Y, of -log p(y | text) summed
over the text, each y drawn from the model's own next-token distribution. That is the second order with the Fisher
information for the Hessian; different tokens are taken for independent. What narrowing a layer costs is measured by it.
Neurons are chosen by its approximation with x and g taken for independent, too,

    1/2 tr(F D^T G D) / T,    G = X^T X,    F = E[g g^T],

as in *Optimizing Neural Networks with Kronecker-factored Approximate Curvature* (Martens and Grosse, arXiv 1503.05671,
section 3), corrected neuron by neuron. Backward passes give g; no weight is changed and no gradient step is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from gluprune.models.families import model_glus
from gluprune.pruning.compensate import RIDGE

Batch = tuple[torch.Tensor, torch.Tensor | None]

# Tokens that the backward pass looks at, spread evenly over the calibration text: F and the coupling have few entries
# beside G.
FISHER_TOKENS = 16_384
# Of these, tokens whose x and g are kept until the costs are found.
_SAMPLE_TOKENS = 4096
# What is added to F's diagonal for the saliencies, as a share of the mean of that: F comes from one drawn label a token.
# This and the next were chosen on SmolLM2-135M among 0.1, 1, 10 and 0.01 to 1, on half of the windows that
# `gluprune_evals.quality` measures on, before the coupling came in.
_DAMPING = 1.0
# What is added to G's diagonal before it is inverted, as a share of a typical entry of that: a neuron that is silent on the
# calibration text, or that others foretell there, may matter on other text.
_RIDGE = 0.1
# Shares of a layer's neurons whose removal is looked at: close where little goes, as costs rise slowly there.
_REMOVED_SHARES = tuple((step / 16) ** 2 for step in range(16))


def removed_counts(size: int) -> list[int]:
    """Numbers of neurons whose removal from a layer of `size` is looked at: 16, from 0 upwards, with repeats if it is small."""
    return [int(share * size) for share in _REMOVED_SHARES]


def _count(batch: Batch) -> int:
    """Number of tokens."""
    ids, mask = batch
    return ids.numel() if mask is None else int(mask.sum())


def _rows(batches: Sequence[Batch]) -> list[Batch]:
    """Rows `[1, S]` of the batches and of their masks, evenly spread, about `FISHER_TOKENS` tokens of them."""
    rows = [
        (ids[i : i + 1], None if mask is None else mask[i : i + 1]) for ids, mask in batches for i in range(len(ids))
    ]
    rows = list(filter(_count, rows))
    count = max(1, min(len(rows), len(rows) * FISHER_TOKENS // sum(map(_count, rows))))
    return [rows[i * len(rows) // count] for i in range(count)]


def is_half_on_cpu(parameter: torch.Tensor) -> bool:
    """Whether it is better computed with in float32: most CPUs know no bf16 or fp16 arithmetic and take many times as long."""
    return parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16)


def _differentiable(model: nn.Module) -> nn.Module:
    """The model, or a float32 copy where it has half precision on a CPU."""
    return copy.deepcopy(model).float() if any(map(is_half_on_cpu, model.parameters())) else model


@dataclass
class LayerGradients:
    """What the backward passes find of one layer's down projection, on the device of its weights.

    fisher: float32 `[H, H]`, F, the mean over the tokens of g g^T.
    coupling: float32 `[I]`, of every neuron i with w_i `[H]` its column of `down`
        E[x_i^2 (w_i^T g)^2] / (E[x_i^2] E[(w_i^T g)^2]): 1 where x_i and g are independent, large where the neuron acts on
        few tokens and the loss is sensitive to what it writes there; 1 where it is silent or writes nothing.
    x, g: `[T', I]` and `[T', H]`, of about `_SAMPLE_TOKENS` tokens, in the dtype that the backward pass runs in.
    """

    fisher: torch.Tensor
    coupling: torch.Tensor
    x: torch.Tensor
    g: torch.Tensor


class _Accumulator:
    """Sums over the tokens of one layer, and of every `step` tokens one as a sample."""

    def __init__(self, down: nn.Linear, step: int):
        device, hidden_size, size = down.weight.device, down.out_features, down.in_features
        self._weight, self._step = down.weight.detach(), step
        self._fisher = torch.zeros(hidden_size, hidden_size, device=device)
        # Sums of x_i^2, of (w_i^T g)^2 and of their product.
        self._active, self._sensitive, self._joint = torch.zeros(3, size, device=device).unbind()
        self._sample: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, g: torch.Tensor, row: int) -> None:
        """Take in x `[S, I]` and g `[S, H]` of the tokens of row number `row`."""
        # From row to row another token is the first. A slice alone would keep the whole row in memory.
        sampled = slice(row % self._step, None, self._step)
        self._sample.append((x[sampled].clone(), g[sampled].clone()))
        x, g = x.float(), g.float()
        self._fisher.addmm_(g.T, g)
        active, sensitive = x.square(), (g @ self._weight.float()).square()  # [S, I]
        self._active += active.sum(0)
        self._sensitive += sensitive.sum(0)
        self._joint += (active * sensitive).sum(0)

    def result(self, tokens: int) -> LayerGradients:
        """Of all rows, which had so many tokens. The accumulator is empty afterwards."""
        independent = self._active * self._sensitive
        coupling = torch.where(independent > 0, tokens * self._joint / independent, 1)
        sample, self._sample = self._sample, []
        return LayerGradients(self._fisher.div_(tokens), coupling, *map(torch.cat, zip(*sample)))


def output_gradients(model: nn.Module, batches: Sequence[Batch], layers: Sequence[int]) -> dict[int, LayerGradients]:
    """The gradients g of what the down projections write.

    Runs the model forward and backward, one row of the batches at a time. Half precision on a CPU is copied to float32
    for it.

    Args:
        model: a causal LM in eval mode. Left as it was; its parameters get no gradients.
        batches: token ids `[B, S]` and masks `[B, S]` (True is a token) or None. Of them rows with about
            `FISHER_TOKENS` tokens are used, one at least.
        layers: layer indices.

    Returns:
        Layer index -> `LayerGradients`.

    Raises:
        ValueError: a gradient is NaN or Inf (names the layer), or the logits are NaN.
    """
    found = {}
    tokens = 0

    def taking_into(accumulator: _Accumulator):
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = arguments[0].detach()[0]  # [S, I]

            def take(gradient: torch.Tensor) -> None:
                kept = slice(None) if mask is None else mask[0].to(x.device)
                accumulator.add(x[kept], gradient[0, kept], number)

            output.register_hook(take)

        return hook

    embedded: list[torch.Tensor] = []

    def start_of_graph(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded[:] = [output.detach().requires_grad_()]
        return embedded[0]

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        model = _differentiable(model)
        glus = model_glus(model)
        embedding = model.get_input_embeddings()
        stack.callback(embedding.register_forward_hook(start_of_graph).remove)
        rows = _rows(batches)
        step = max(1, sum(map(_count, rows)) // _SAMPLE_TOKENS)
        for index in layers:
            down = glus[index].down
            found[index] = _Accumulator(down, step)
            stack.callback(down.register_forward_hook(taking_into(found[index])).remove)
        generator = torch.Generator().manual_seed(0)
        device = embedding.weight.device
        for number, (ids, mask) in enumerate(tqdm(rows, desc="gradients", unit="row", disable=None, leave=False)):
            # Autograd takes no tensors that were made in inference mode.
            ids, mask = ids.clone(), None if mask is None else mask.clone()
            attention_mask = None if mask is None else mask.long().to(device)
            logits = model(input_ids=ids.to(device), attention_mask=attention_mask, use_cache=False).logits
            logits = (logits[0] if mask is None else logits[0, mask[0].to(logits.device)]).float()  # [T, V]
            probabilities = logits.detach().softmax(-1).cpu()  # drawn from on the CPU, so that every device draws alike
            if probabilities.isnan().any():
                raise ValueError("the logits are NaN on the calibration text")
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            loss.backward(inputs=embedded)
            tokens += len(drawn)
            del logits, loss  # with them, the activations go before those of the next row come
        results = {index: accumulator.result(tokens) for index, accumulator in found.items()}
    for index, gradients in results.items():
        if not gradients.fisher.isfinite().all():
            raise ValueError(f"layer {index} has NaN or Inf in its gradients on the calibration text")
    return results


def _cholesky(gram: torch.Tensor, ridge: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower factor of G + lambda I in float64, and lambda: `ridge`, or as much more as it takes."""
    if not gram.isfinite().all():
        raise ValueError("the Gram matrix has NaN or Inf")
    ridge = ridge.double() or torch.ones_like(ridge, dtype=torch.float64)  # where all neurons are silent
    while True:
        regularized = gram.double()
        regularized.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(regularized)
        if not failed:
            return lower, ridge
        ridge = 10 * ridge  # float32 sums of neurons that dwarf others can round a small eigenvalue below zero


def saliencies(down: torch.Tensor, gram: torch.Tensor, gradients: LayerGradients, tokens: int) -> torch.Tensor:
    """By how much, about, the loss of a token rises when a neuron goes and the others are re-solved to make up for it.

    With w_i `[H]` the neuron's column of `down`: w_i^T F w_i / (2 T [G^-1]_ii), the saliency of *Optimal Brain Surgeon*
    (Hassibi and Stork, 1993, eq. 5) for a whole column and factored curvature, as in *The LLM Surgeon* (van der
    Ouderaa et al., arXiv 2312.17244, section 3.2), whose labels are those of the text. F and G are damped first. That is
    multiplied by the mean of 1 and the neuron's coupling, which few tokens tell and which is its own, not that of what
    re-solving leaves of it.

    Args:
        down: `[H, I]`, any floating dtype.
        gram: float32 `[I, I]`, G over all tokens.
        gradients: of the layer.
        tokens: T, of G.

    Returns:
        float32 `[I]`.

    Raises:
        ValueError: the Gram matrix has NaN or Inf.
    """
    damped = gradients.fisher.clone()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
    written = (down.float() * (damped @ down.float())).sum(0)  # [I], w_i^T F w_i
    diagonal = gram.diagonal()
    # The median is zero where most neurons are silent on the text.
    lower, _ = _cholesky(gram, _RIDGE * (diagonal.median() or diagonal.mean()))
    inverse = torch.cholesky_inverse(lower)
    return (written / inverse.diagonal()).float() * (1 + gradients.coupling) / (4 * tokens)


def narrowing_costs(
    down: torch.Tensor, gram: torch.Tensor, gradients: LayerGradients, saliency: torch.Tensor
) -> torch.Tensor:
    """By how much, about, the loss of a token rises when a layer alone is narrowed and its down projection re-solved.

    One factorisation serves every width. With the neurons in the order in which they stay, S those that stay, R those that
    go and L L^T = G + lambda I, re-solving (`gluprune.pruning.compensate`) changes W by

        D_S = (G_SS + lambda I)^-1 G_SR W_R = L_SS^-T L_RS^T W_R,    D_R = -W_R,

    so with z = L^-1 x of a token what the change does to its loss is x^T D g = -(W_R g)^T L_RR z_R, summed up neuron by
    neuron from the last; the cost is the mean of 1/2 (x^T D g)^2 over the sample of tokens that `gradients` holds.

    Args:
        down: `[H, I]`, any floating dtype.
        gram: float32 `[I, I]`, G over all tokens.
        gradients: of the layer.
        saliency: float32 `[I]`; the neurons of lowest saliency go first.

    Returns:
        float32 `[16]`: with each of the `removed_counts(I)` gone; entry 0 is 0.

    Raises:
        ValueError: the Gram matrix has NaN or Inf.
    """
    order = saliency.argsort(descending=True)
    lower = _cholesky(gram[order][:, order], RIDGE * gram.diagonal().mean())[0].float()
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
