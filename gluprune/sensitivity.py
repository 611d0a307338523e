"""What it costs the whole model, by its loss, that neurons of one layer go: to choose neurons, and widths by layer.

A layer's down projection turns X `[T, I]` into Y = X W, W `[I, H]`. A change D of W moves the model away from what it
was by a divergence of about

    1/2 tr(F D^T G D) / T,    G = X^T X,    F = E[g g^T]

a token, with g `[H]` the gradient, with respect to a token's row of Y, of -log p(y | text) summed over the text, each y
drawn from the model's own next-token distribution. That is the second order with the Fisher information for the Hessian,
and for the Fisher information the two factors of *Optimizing Neural Networks with Kronecker-factored Approximate
Curvature* (Martens and Grosse, arXiv 1503.05671, section 3): x and g are taken for independent, and so are different
tokens. Backward passes give F; no weight is changed and no gradient step is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn
from tqdm.auto import tqdm

from gluprune.compensate import RIDGE
from gluprune.families import model_glus

Batch = tuple[torch.Tensor, torch.Tensor | None]

# Tokens that the backward pass looks at, spread evenly over the calibration text: F has few entries beside G.
FISHER_TOKENS = 16_384
# What is added to F's diagonal for the saliencies, as a share of the mean of that: F comes from one drawn label a token.
# This and the next were chosen on SmolLM2-135M among 0.1, 1, 10 and 0.01 to 1, on half of the windows that
# `evals.quality` measures on.
_DAMPING = 1.0
# What is added to G's diagonal before it is inverted, as a share of a typical entry of that: a neuron that is silent on the
# calibration text, or that others foretell there, may matter on other text.
_RIDGE = 0.1
# Shares of a layer's neurons whose removal is looked at: close where little goes, as costs rise slowly there.
_REMOVED_SHARES = tuple((step / 16) ** 2 for step in range(16))


def removed_counts(size: int) -> list[int]:
    """Numbers of neurons whose removal from a layer of `size` is looked at: 16, from 0 upwards, with repeats if it is small."""
    return [int(share * size) for share in _REMOVED_SHARES]


def _rows(batches: Sequence[Batch]) -> list[Batch]:
    """Rows `[1, S]` of the batches and of their masks, evenly spread, about `FISHER_TOKENS` tokens of them."""
    rows = [
        (ids[i : i + 1], None if mask is None else mask[i : i + 1]) for ids, mask in batches for i in range(len(ids))
    ]
    rows = [(ids, mask) for ids, mask in rows if ids.numel() and (mask is None or mask.any())]
    tokens = sum(ids.numel() if mask is None else int(mask.sum()) for ids, mask in rows)
    count = max(1, min(len(rows), len(rows) * FISHER_TOKENS // tokens))
    return [rows[i * len(rows) // count] for i in range(count)]


def is_half_on_cpu(parameter: torch.Tensor) -> bool:
    """Whether it is better computed with in float32: most CPUs know no bf16 or fp16 arithmetic and take many times as long."""
    return parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16)


def _differentiable(model: nn.Module) -> nn.Module:
    """The model, or a float32 copy where it has half precision on a CPU."""
    return copy.deepcopy(model).float() if any(map(is_half_on_cpu, model.parameters())) else model


def output_fisher(model: nn.Module, batches: Sequence[Batch], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """F of every layer, the Fisher information of what its down projection writes.

    Runs the model forward and backward, one row of the batches at a time. Half precision on a CPU is copied to float32
    for it.

    Args:
        model: a causal LM in eval mode. Left as it was; its parameters get no gradients.
        batches: token ids `[B, S]` and masks `[B, S]` (True is a token) or None. Of them rows with about
            `FISHER_TOKENS` tokens are used, one at least.
        layers: layer indices.

    Returns:
        Layer index -> float32 `[H, H]`, the mean over the tokens of g g^T, on the device of the layer.

    Raises:
        ValueError: a gradient is NaN or Inf (names the layer), or the logits are NaN.
    """
    found = {}
    tokens = 0

    def taking_into(fisher: torch.Tensor):
        def take(gradient: torch.Tensor) -> None:
            rows = gradient.flatten(0, -2).float()  # [S, H]
            fisher.addmm_(rows.T, rows)

        def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
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
        for index in layers:
            down = glus[index].down
            found[index] = torch.zeros(down.out_features, down.out_features, device=down.weight.device)
            stack.callback(down.register_forward_hook(taking_into(found[index])).remove)
        generator = torch.Generator().manual_seed(0)
        device = embedding.weight.device
        for ids, mask in tqdm(_rows(batches), desc="gradients", unit="row", disable=None, leave=False):
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
    for index, fisher in found.items():
        fisher /= tokens
        if not fisher.isfinite().all():
            raise ValueError(f"layer {index} has NaN or Inf in its gradients on the calibration text")
    return found


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


def saliencies(down: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor, tokens: int) -> torch.Tensor:
    """By how much, about, the loss of a token rises when a neuron goes and the others are re-solved to make up for it.

    With w_i `[H]` the neuron's column of `down`: w_i^T F w_i / (2 T [G^-1]_ii), the saliency of *Optimal Brain Surgeon*
    (Hassibi and Stork, 1993, eq. 5) for a whole column and factored curvature, as in *The LLM Surgeon* (van der
    Ouderaa et al., arXiv 2312.17244, section 3.2), whose labels are those of the text. F and G are damped first.

    Args:
        down: `[H, I]`, any floating dtype.
        gram: float32 `[I, I]`, G over all tokens.
        fisher: float32 `[H, H]`, F.
        tokens: T.

    Returns:
        float32 `[I]`.

    Raises:
        ValueError: the Gram matrix has NaN or Inf.
    """
    damped = fisher.clone()
    damped.diagonal().add_(_DAMPING * fisher.diagonal().mean())
    written = (down.float() * (damped @ down.float())).sum(0)  # [I], w_i^T F w_i
    diagonal = gram.diagonal()
    # The median is zero where most neurons are silent on the text.
    lower, _ = _cholesky(gram, _RIDGE * (diagonal.median() or diagonal.mean()))
    inverse = torch.cholesky_inverse(lower)
    return (written / inverse.diagonal()).float() / (2 * tokens)


def narrowing_costs(
    down: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor, saliency: torch.Tensor, tokens: int
) -> torch.Tensor:
    """By how much, about, the loss of a token rises when a layer alone is narrowed and its down projection re-solved.

    One factorisation serves every width. With the neurons in the order in which they stay, L L^T = G + lambda I, S those
    that stay and R those that go, re-solving (`gluprune.compensate`) changes W by

        D_S = (G_SS + lambda I)^-1 G_SR W_R = L_SS^-T L_RS^T W_R,    D_R = -W_R,

    and D^T (G + lambda I) D = (L_RR^T W_R)^T (L_RR^T W_R), as L_RR L_RR^T is the Schur complement of S.

    Args:
        down: `[H, I]`, any floating dtype.
        gram: float32 `[I, I]`, G over all tokens.
        fisher: float32 `[H, H]`, F.
        saliency: float32 `[I]`; the neurons of lowest saliency go first.
        tokens: T.

    Returns:
        float32 `[16]`: with each of the `removed_counts(I)` gone; entry 0 is 0.

    Raises:
        ValueError: the Gram matrix has NaN or Inf.
    """
    size = down.shape[1]
    order = saliency.argsort(descending=True)
    lower, ridge = _cholesky(gram[order][:, order], RIDGE * gram.diagonal().mean())
    lower, ridge = lower.float(), ridge.float()
    weight = down.float().T[order]  # [I, H]
    costs = []
    for removed in removed_counts(size):
        kept = size - removed
        gone = weight[kept:]  # [R, H]
        lost = lower[kept:, kept:].T @ gone  # [R, H]
        moved = torch.linalg.solve_triangular(lower[:kept, :kept].T, lower[kept:, :kept].T @ gone, upper=True)  # [S, H]
        form = lost.T @ lost - ridge * (moved.T @ moved + gone.T @ gone)  # D^T G D, [H, H]
        costs.append((fisher * form).sum() / (2 * tokens))
    return torch.stack(costs)
