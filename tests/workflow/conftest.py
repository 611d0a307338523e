"""A tiny checkpoint, a text and arguments for `shrink`."""

import pytest
import torch

import gluprune
from tests.helpers.threads import one_thread  # noqa: F401
from tests.helpers.tokenizers import begins_texts, byte_tokenizer


@pytest.fixture
def tokenizer(request):
    """One that adds no tokens; with `indirect=True` and a true parameter, one that begins every text with its BOS."""
    return begins_texts(byte_tokenizer()) if getattr(request, "param", False) else byte_tokenizer()


@pytest.fixture
def source(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "source"
    gluprune.save(tiny_model(seed=1, dtype=torch.bfloat16, vocab_size=len(tokenizer)), path, tokenizer)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(f"Line {number}: {number**3 % 9973} of the notes." for number in range(60)))
    return path


@pytest.fixture
def short(text):
    """Arguments of a short run."""
    return {"text": [text], "own_windows": 2, "windows": 6, "length": 24, "multiple_of": 16, "device": "cpu"}
