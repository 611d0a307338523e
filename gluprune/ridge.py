"""The ridge of least-squares problems on a Gram matrix, and the factor that solves them.

Text holds each neuron's typical activity thousands of times, but what a trained model does on other text differs by more
than the chance of sampling: the ridge stands for that, and so grows with the Gram matrix.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

# Measured on held-out text: best between 0.1 and 1.
_SHARE = 0.3
# A Gram matrix that is singular in spite of the ridge (rounding, a few neurons that dwarf the others) is tried again in
# float64, then with more ridge.
_ATTEMPTS = ((torch.float32, 1), (torch.float64, 1), (torch.float64, 10), (torch.float64, 100))


def ridge_of(gram: torch.Tensor) -> torch.Tensor:
    """lambda for a Gram matrix `[I, I]`: 0.3 times the median of its diagonal, dead neurons left out; 0 if all are dead.

    The mean in place of the median would be set by a handful of neurons in the layers that write massive activations
    (Sun et al., arXiv 2402.17762), which a few tokens drive: there it is up to 600 times the median, and would hold all
    other neurons where they are.
    """
    diagonal = gram.diagonal()
    alive = diagonal[diagonal > 0]
    return _SHARE * alive.median() if len(alive) else diagonal.new_zeros(())


def cholesky(gram: torch.Tensor, ridge: torch.Tensor, label: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The lower Cholesky factor of gram + ridge I, and the ridge that it took.

    Args:
        gram: float32 `[n, n]`, symmetric.
        ridge: above 0.
        label: names the layer in the log.

    Returns:
        Factor `[n, n]` and ridge, both in float32 or float64; None where no attempt gives finite numbers.
    """
    for number, (dtype, times) in enumerate(_ATTEMPTS):
        taken = ridge.to(dtype) * times
        regularized = gram.to(dtype, copy=True)
        regularized.diagonal().add_(taken)
        lower, failed = torch.linalg.cholesky_ex(regularized)
        if not failed and lower.isfinite().all():
            if number:
                message = "%s: Gram matrix near singular, solved in %s with %d times the ridge"
                logger.warning(message, label, dtype, times)
            return lower, taken
    logger.warning("%s: the Gram matrix is singular whatever the ridge", label)
    return None
