"""Perplexity compared with the sum of log-probabilities in float64."""

import math

import pytest
import torch

from gluprune.measure.perplexity import cut_windows, perplexity


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


@pytest.mark.parametrize("tokens, window", [(2, 5), (5, 5), (6, 5), (11, 5), (40, 512)])
def test_windows_that_begin_with_a_token(tiny_model, tokens, window):
    """Every token of the text is predicted once, from the token that begins its window and those after it."""
    model, begin = tiny_model(dtype=torch.float64), torch.tensor([1])
    ids = torch.randint(3, 64, (tokens,))
    total = 0.0
    for position in range(tokens):
        start = position // window * window
        logits = model(torch.cat([begin, ids[start:position]])[None]).logits[0, -1]
        total -= logits.log_softmax(0)[ids[position]].item()
    assert perplexity(model, ids, window, begin=1) == pytest.approx(math.exp(total / tokens), rel=1e-6)
    first, *_ = cut_windows(ids, window, 1, begin=1)
    assert first.tolist() == [1, *ids[:window].tolist()]


def test_one_token_is_too_few(tiny_model):
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        perplexity(tiny_model(), torch.tensor([5]))


def test_some_windows_evenly_spread(tiny_model):
    """Of the windows that begin at tokens 0, 5, 10, 15 and 20: the first, second and fourth."""
    model, ids = tiny_model(dtype=torch.float64), torch.randint(3, 64, (24,))
    chosen = [ids[start : start + 6] for start in (0, 5, 15)]
    assert [chunk.tolist() for chunk in cut_windows(ids, 5, 3)] == [chunk.tolist() for chunk in chosen]
    logs = [math.log(perplexity(model, chunk, 5)) for chunk in chosen]
    assert perplexity(model, ids, 5, windows=3) == pytest.approx(math.exp(sum(logs) / 3), rel=1e-6)
    assert perplexity(model, ids, 5, windows=9) == perplexity(model, ids, 5)


@pytest.mark.parametrize("given", [{"length": 0}, {"windows": 0}])
def test_numbers_below_one(given, tiny_model):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be at least 1, got 0"):
        perplexity(tiny_model(), torch.arange(3, 9), **given)


def test_a_model_without_a_head(tiny_model):
    with pytest.raises(ValueError, match="perplexity needs a model with a language-model head, but LlamaModel has"):
        perplexity(tiny_model().model, torch.arange(3, 9))


def test_a_batch_of_one_row(tiny_model):
    model, ids = tiny_model(), torch.randint(3, 64, (30,))
    expected = perplexity(model, ids, 7)
    assert perplexity(model, ids[None], 7) == perplexity(model, ids.int(), 7) == expected


def test_in_eval_mode(tiny_model):
    """Without dropout; afterwards the model is in its former mode."""
    model, ids = tiny_model(attention_dropout=0.9), torch.randint(3, 64, (30,))
    expected = perplexity(model.eval(), ids)
    assert perplexity(model.train(), ids) == expected and model.training


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ("text", TypeError, r"ids must be a tensor of token ids, got str: give tokenizer\(text"),
        ([3, 4], TypeError, "ids must be a tensor of token ids, got list"),
        (torch.ones(2, 9, dtype=torch.long), ValueError, r"shape \[T\] or \[1, T\], got torch.int64 of shape \[2, 9\]"),
        (torch.ones(9), ValueError, r"got torch.float32 of shape \[9\]"),
        (torch.tensor([3, 64]), ValueError, "ids go from 3 to 64; the model's vocabulary goes from 0 to 63"),
        (torch.tensor([-1, 5]), ValueError, "ids go from -1 to 5"),
    ],
)
def test_ids_that_are_no_text(tiny_model, ids, error, message):
    with pytest.raises(error, match=message):
        perplexity(tiny_model(), ids)
