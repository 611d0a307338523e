"""The timer of generation, against a model whose steps take a known time."""

import time

import pytest
import torch

from gluprune.generation import time_generation


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode_are_told_apart(tiny_model, monkeypatch, batch):
    """Prefill sleeps 0.2 s and a decode step 0.02 s: the order and the lower bounds must show, whatever the machine."""
    model, steps = tiny_model(), []
    original = model.forward

    def slow(*arguments, **options):
        tokens = options["input_ids"].shape[1]
        steps.append(tokens)
        time.sleep(0.2 if tokens > 1 else 0.02)
        return original(*arguments, **options)

    monkeypatch.setattr(model, "forward", slow)
    timing = time_generation(model, torch.randint(3, 64, (batch, 9)), new_tokens=6, repeats=2)
    assert steps == [9, 1, 1, 1, 1, 1] * 3  # a warm-up and two repeats, each of exactly six tokens
    assert timing.ttft >= 0.2 and timing.tpot >= 0.02
    assert timing.ttlt >= timing.ttft + 5 * 0.02
    assert timing.ttlt == pytest.approx(timing.ttft + 5 * timing.tpot, rel=0.5)
    assert timing.prefill_tokens_per_second == pytest.approx(9 * batch / timing.ttft)
    assert timing.decode_tokens_per_second == pytest.approx(batch / timing.tpot)


def test_end_of_sequence_does_not_stop_it(tiny_model, monkeypatch):
    model = tiny_model()
    model.lm_head.weight.data[2] = 100 * model.lm_head.weight.data.abs().max()  # token 2, end of sequence, is everywhere likely
    calls = []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **o: calls.append(1) or original(*a, **o))
    assert time_generation(model, torch.randint(3, 64, (1, 4)), new_tokens=7, repeats=1).new_tokens == 7
    assert len(calls) == 14


def test_one_new_token_is_too_few(tiny_model):
    with pytest.raises(ValueError, match="at least 2 .*, got 1"):
        time_generation(tiny_model(), torch.tensor([[5, 6]]), new_tokens=1)
