"""Checkpoints to prune on disk."""

import pytest

from tests.helpers.streaming import tiny_model
from tests.helpers.streaming_faults import make_source


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder
