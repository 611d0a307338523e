"""Least squares from Gram matrices `G = X^T X`, without X."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

# The ridge lambda, as a share of the mean of G's diagonal.
RIDGE = 0.01
# A Gram matrix may be singular despite the ridge: rounding, or a few neurons that dwarf the others. It is then
# solved in float64, and after that with more ridge.
_ATTEMPTS = ((torch.float32, 1), (torch.float64, 1), (torch.float64, 10), (torch.float64, 100))


def solve(gram: torch.Tensor, target: torch.Tensor, ridge: torch.Tensor, label: str) -> torch.Tensor | None:
    """Return (G + lambda I)^-1 target, or None, with a log message, if no attempt gives finite numbers.

    Args:
        gram: float32 `[N, N]`, G.
        target: float32 `[N, H]`.
        ridge: Scalar tensor, lambda. It is 0 only if all of G is 0; the result is then 0.
        label: Names the layer in the log.

    Returns:
        float32 `[N, H]`.
    """
    if not ridge > 0:
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
    logger.warning("%s: the Gram matrix is singular with every ridge tried; the weights are left unchanged", label)
    return None


def damped_cholesky(gram: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Return the lower Cholesky factor of G + lambda I, with lambda at least `ridge` and as large as needed.

    Args:
        gram: float32 `[N, N]`, G.
        ridge: Scalar tensor; 0 counts as 1.

    Returns:
        float64 `[N, N]`.

    Raises:
        ValueError: The Gram matrix has NaN or Inf.
    """
    if not gram.isfinite().all():
        raise ValueError("the Gram matrix has NaN or Inf")
    ridge = ridge.double() or torch.ones_like(ridge, dtype=torch.float64)  # 0 if all neurons are silent
    while True:
        regularized = gram.double()
        regularized.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(regularized)
        if not failed:
            return lower
        ridge = 10 * ridge  # float32 sums of neurons that dwarf others can round a small eigenvalue below zero
