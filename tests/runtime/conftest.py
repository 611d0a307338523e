"""Small models on the device that runs kernels, and a counter of kernel calls."""

import pytest

from gluprune.runtime import operator
from gluprune.runtime.prepared import Prepared
from tests.helpers.tiny_models import DEVICE, tiny_model, token_ids


@pytest.fixture
def ids():
    return token_ids(device=DEVICE)


@pytest.fixture
def model():
    return tiny_model(device=DEVICE)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The backends of the calls that reach the kernels, examined or prepared."""
    calls, kernels, run = [], operator.run_kernels, Prepared.run

    def prepared(self, mlp, x):
        y = run(self, mlp, x)
        if y is not None:
            calls.append(mlp.backend)
        return y

    monkeypatch.setattr(operator, "run_kernels", lambda *args: calls.append(args[-1]) or kernels(*args))
    monkeypatch.setattr(Prepared, "run", prepared)
    return calls
