"""Perplexity compared with the sum of log-probabilities in float64."""

import math

import pytest
import torch

from gluprune.measure.perplexity import perplexity


@pytest.mark.parametrize("tokens, window", [(2, 5), (6, 5), (7, 5), (11, 5), (12, 5), (40, 512)])
def test_against_the_definition(tiny_model, tokens, window):
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(3, 64, (tokens,))
    total = 0.0
    for position in range(1, tokens):
        start = (position - 1) // window * window  # context restarts at every window
        logits = model(ids[None, start:position]).logits[0, -1]
        total -= logits.log_softmax(0)[ids[position]].item()
    assert perplexity(model, ids, window) == pytest.approx(math.exp(total / (tokens - 1)), rel=1e-6)


def test_one_token_is_too_few(tiny_model):
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        perplexity(tiny_model(), torch.tensor([5]))
