"""Re-solve the down projection for the neurons that stay, by least squares on calibration data.

With X `[T, I]` the inputs of `down_proj`, W `[I, H]` its transposed weight, S the neurons that stay and R those that
go, the new weight is

    W' = argmin ||X W - X_S W'||^2 + lambda ||W' - W_S||^2  =  W_S + (G_SS + lambda I)^-1 G_SR W_R,    G = X^T X,

so it follows from the Gram matrix alone, and the text need not be kept. Rebuilding a layer's output by linear least
squares after channels were removed is from *Channel Pruning for Accelerating Very Deep Neural Networks* (He et al.,
arXiv 1707.06168, eq. 1, solved for W). The ridge pulls towards the weights that are there, not towards zero: with no
neuron removed, or no data, nothing changes.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack

import torch
from torch import nn

logger = logging.getLogger(__name__)

# lambda, as a share of the mean of G's diagonal.
RIDGE = 0.01
# A Gram matrix that is singular in spite of the ridge (rounding, a few neurons that dwarf the others) is tried again in
# float64, then with more ridge.
_ATTEMPTS = ((torch.float32, 1), (torch.float64, 1), (torch.float64, 10), (torch.float64, 100))


def resolved_down(down: torch.Tensor, kept: torch.Tensor, gram: torch.Tensor, label: str = "down_proj") -> torch.Tensor:
    """The down projection of the kept neurons, re-solved on the calibration data.

    The result, as rounded to its dtype, is checked against the plain `down[:, kept]` on the Gram matrix; where it is
    not nearer to the whole layer's output, the plain one is returned.

    Args:
        down: `[H, I]`, any floating dtype.
        kept: int64 `[width]`, ascending.
        gram: float32 `[I, I]`, X^T X of the calibration data, on the device of `down`.
        label: names the layer in the log.

    Returns:
        `[H, width]`, dtype and device of `down`, contiguous.
    """
    kept = kept.to(down.device)
    is_removed = torch.ones(down.shape[1], dtype=torch.bool, device=down.device)
    is_removed[kept] = False
    removed = is_removed.nonzero().squeeze(1)
    plain = down[:, kept]
    kept_gram = gram[kept][:, kept]  # [width, width]
    if dead := int((kept_gram.diagonal() == 0).sum()):
        logger.info("%s: %d of %d kept neurons are dead on the calibration data", label, dead, len(kept))
    # What the removed neurons wrote, seen from the kept ones.
    target = gram[kept][:, removed] @ down[:, removed].float().T  # [width, H]
    change = solve(kept_gram, target, RIDGE * gram.diagonal().mean(), label)
    if change is None:
        return plain
    resolved = (plain.float() + change.T).to(down.dtype)
    change = (resolved.float() - plain.float()).T
    # ||X W - X_S W_S||^2 - ||X W - X_S W'||^2, rounding to the dtype included.
    gain = (change * (2 * target - kept_gram @ change)).sum(dtype=torch.float64)
    if not gain > 0:
        logger.info("%s: re-solving gains nothing on the calibration data; its weights are kept as they were", label)
        return plain
    return resolved


def solve(gram: torch.Tensor, target: torch.Tensor, ridge: torch.Tensor, label: str) -> torch.Tensor | None:
    """(gram + ridge I)^-1 target in float32, or None, which is told in the log, where no attempt gives finite numbers."""
    if not ridge > 0:  # dead on all of the data: nothing to solve
        return torch.zeros_like(target)
    for number, (dtype, factor) in enumerate(_ATTEMPTS):
        regularized = gram.to(dtype, copy=True)
        regularized.diagonal().add_(ridge.to(dtype) * factor)
        lower, failed = torch.linalg.cholesky_ex(regularized)
        if not failed:
            change = torch.cholesky_solve(target.to(dtype), lower).float()
            if change.isfinite().all():
                if number:
                    message = "%s: Gram matrix near singular, solved in %s with %d times the ridge"
                    logger.warning(message, label, dtype, factor)
                return change
    logger.warning("%s: the Gram matrix is singular whatever the ridge; its weights are kept as they were", label)
    return None


def replace_down(projection: nn.Linear, weight: torch.Tensor, undo: ExitStack) -> None:
    """Put a re-solved weight `[H, width]` into a narrowed down projection; the Parameter object and the bias stay.

    `undo` receives the callback that puts the narrowed weight back, which therefore stays in memory until then.
    """
    undo.callback(setattr, projection.weight, "data", projection.weight.data)
    projection.weight.data = weight
