"""Refit the down projection to the remaining neurons, by least squares on calibration data.

With X `[T, I]` the inputs of `down_proj`, W `[I, H]` its transposed weight, S the kept neurons and R the removed ones,
the new weight is

    W' = argmin ||X W - X_S W'||^2 + lambda ||W' - W_S||^2  =  W_S + (G_SS + lambda I)^-1 G_SR W_R,    G = X^T X.

It is computed from the Gram matrix, so the text need not be kept. Rebuilding a layer's output by linear least squares
after channels were removed is from *Channel Pruning for Accelerating Very Deep Neural Networks* (He et al., arXiv
1707.06168, eq. 1, solved for W). The ridge pulls towards the current weights, not towards zero: with no neuron removed,
or no data, nothing changes.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack

import torch
from torch import nn

from gluprune.calibration.least_squares import RIDGE, solve

logger = logging.getLogger(__name__)


def refitted_down(down: torch.Tensor, kept: torch.Tensor, gram: torch.Tensor, label: str = "down_proj") -> torch.Tensor:
    """Return the down projection of the kept neurons, refitted on the calibration data.

    The result, rounded to its dtype, is compared with the plain `down[:, kept]` on the Gram matrix. If it is not closer
    to the output of the full layer, the plain one is returned.

    Args:
        down: `[H, I]`, any floating dtype.
        kept: int64 `[width]`, ascending.
        gram: float32 `[I, I]`, X^T X of the calibration data, on the device of `down`.
        label: Names the layer in the log.

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
    # The contribution of the removed neurons, projected on the kept ones.
    target = gram[kept][:, removed] @ down[:, removed].float().T  # [width, H]
    change = solve(kept_gram, target, RIDGE * gram.diagonal().mean(), label)
    if change is None:
        return plain
    refitted = (plain.float() + change.T).to(down.dtype)
    change = (refitted.float() - plain.float()).T
    # ||X W - X_S W_S||^2 - ||X W - X_S W'||^2, after rounding to the dtype.
    gain = (change * (2 * target - kept_gram @ change)).sum(dtype=torch.float64)
    if not gain > 0:
        logger.info("%s: refitting gives no gain on the calibration data; the weights are left unchanged", label)
        return plain
    return refitted


def replace_down(projection: nn.Linear, weight: torch.Tensor, undo: ExitStack) -> None:
    """Put a refitted weight `[H, width]` into a narrowed down projection; the Parameter object and the bias stay.

    `undo` gets the callback that restores the former weight, which stays in memory until then.
    """
    undo.callback(setattr, projection.weight, "data", projection.weight.data)
    projection.weight.data = weight
