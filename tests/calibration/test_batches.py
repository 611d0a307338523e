"""Batches of windows of text."""

import pytest
import torch

from gluprune.calibration.batches import batches_from_text, begin_token, read_batches
from gluprune.calibration.collect import calibrate
from tests.helpers.calibrations import random_batches
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.tokenizers import begins_texts, byte_tokenizer


class Characters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": [ord(character) for character in text]})


def test_windows_are_spread_over_the_text():
    text = "".join(chr(1000 + i) for i in range(107))
    found = batches_from_text(Characters(), text, windows=4, length=10, batch_size=3)
    assert [batch.shape for batch in found] == [(3, 10), (1, 10)]
    starts = torch.cat(found)[:, 0] - 1000
    assert starts.tolist() == [0, 20, 50, 70]
    assert torch.equal(torch.cat(found) - 1000, starts[:, None] + torch.arange(10))
    every = torch.cat(batches_from_text(Characters(), text, windows=50, length=10))
    assert torch.equal(every.flatten(), torch.arange(1000, 1100))


def test_several_texts_give_as_many_windows_each():
    texts = [chr(1000 + number) * length for number, length in enumerate((300, 25, 300))]
    found = torch.cat(batches_from_text(Characters(), texts, windows=4, length=10))
    assert found[:, 0].tolist() == [1000] * 4 + [1001] * 2 + [1002] * 4  # the second has only two
    assert torch.equal(found, found[:, :1].expand(-1, 10))
    ordered = ["".join(chr(start + i) for i in range(100)) for start in (1000, 2000)]
    single = [torch.cat(batches_from_text(Characters(), text, windows=4, length=10)) for text in ordered]
    assert torch.equal(torch.cat(batches_from_text(Characters(), ordered, windows=4, length=10)), torch.cat(single))
    for given, message in [
        ([], "give at least one calibration text"),
        ([*texts, "x" * 9], "text 4 of 4 has 9 tokens: one window needs 10; join short texts of one kind"),
    ]:
        with pytest.raises(ValueError, match=message):
            batches_from_text(Characters(), given, windows=8, length=10)


def test_every_window_begins_as_the_tokenizer_begins_texts():
    """With BOS where the tokenizer adds it (Llama 3, Gemma), and only there: having one is not enough."""
    plain, begins = byte_tokenizer(), begins_texts(byte_tokenizer())
    assert (begin_token(plain), begin_token(begins)) == (None, begins.bos_token_id) == (None, 1)
    text = "".join(chr(ord("a") + i % 26) for i in range(65))
    found = torch.cat(batches_from_text(begins, text, windows=9, length=10, batch_size=3))
    assert found.shape == (7, 10) and (found[:, 0] == 1).all()
    assert torch.equal(found[:, 1:], torch.cat(batches_from_text(plain, text, windows=9, length=9)))
    with pytest.raises(ValueError, match="length must be at least 2, since windows begin with .*BOS token; got 1"):
        batches_from_text(begins, text, length=1)
    with pytest.raises(ValueError, match="has 65 tokens: one window needs 66"):
        batches_from_text(begins, text, length=67)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"length": 108}, "has 107 tokens: one window needs 108"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"length": 0}, "length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_windows(given, message):
    with pytest.raises(ValueError, match=message):
        batches_from_text(Characters(), "x" * 107, **given)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_every_integer_dtype_holds_token_ids(dtype):
    """A small vocabulary is often stored in few bits; embeddings take only int32 and int64."""
    model, batches = make_tiny_model(seed=4), random_batches()
    found = calibrate(model, [batch.to(dtype) for batch in batches])
    expected = calibrate(model, batches)
    for name in ("squares", "gram"):
        assert torch.equal(getattr(found.layers[1], name), getattr(expected.layers[1], name)), name
    assert [ids.data_ptr() for ids, _ in read_batches(model, batches)] == [ids.data_ptr() for ids in batches]
