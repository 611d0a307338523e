"""Small models on the device that runs kernels, and a counter of kernel calls."""

import pytest

from gluprune.runtime import operator
from tests.helpers.tiny_models import DEVICE, tiny_model, token_ids


@pytest.fixture
def ids():
    return token_ids(device=DEVICE)


@pytest.fixture
def model():
    return tiny_model(device=DEVICE)


@pytest.fixture
def kernel_calls(monkeypatch):
    """A list with the path of every call of the kernels."""
    calls, kernels = [], operator.run_kernels
    monkeypatch.setattr(operator, "run_kernels", lambda *args: calls.append(args[-1]) or kernels(*args))
    return calls
