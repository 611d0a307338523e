"""Shared test set-up. Without CUDA the kernels run in Triton's interpreter, selected before triton is imported."""

import functools
import inspect
import logging
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# With several workers (pytest -n), each uses its share of the cores. Processes that tests start are not workers.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.pop("PYTEST_XDIST_WORKER_COUNT")))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)

from transformers import AutoModelForCausalLM, AutoTokenizer

from gluprune.demo.smollm2 import smollm2_checkpoint
from gluprune.runtime import operator
from tests.helpers.marks import each_family
from tests.helpers.tiny_models import assert_unchanged, make_tiny_model, snapshot


def quicken_interpreter():
    """Cache the interpreter's search for built-ins of `tl`, which it repeats at each call of a device function.

    The search takes a third of the time of the kernel tests. The interpreter replaces only built-ins, whose names never
    change.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtin_names(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def getmembers(package):
        return [(name, getattr(package, name)) for name in builtin_names(package)]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})


if operator.INTERPRETED:
    quicken_interpreter()


def pytest_collection_modifyitems(config, items):
    """Start with the longest tests: at the end, one worker would run them while the others wait."""
    items.sort(key=lambda item: item.path.name != "test_examples.py")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def restored_output():
    """Take back what `-v` and `-q` of a command change: the package's logger and variables of the environment."""
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")
    logger, before = logging.getLogger("gluprune"), {name: os.environ.get(name) for name in names}
    level, handlers, propagate = logger.level, logger.handlers[:], logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers[:], logger.propagate = handlers, propagate
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def smollm2_path():
    """Folder of the real SmolLM2-135M-Instruct in bf16 (written to the user's cache on first use)."""
    return smollm2_checkpoint()


@pytest.fixture
def smollm2(smollm2_path):
    return AutoModelForCausalLM.from_pretrained(smollm2_path).eval()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_path):
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture
def tiny_model():
    return make_tiny_model


@pytest.fixture(params=each_family())
def family_name(request):
    return request.param


@pytest.fixture
def unchanged():
    """`with unchanged(model), pytest.raises(...)`: the block must leave the model unchanged."""

    @contextmanager
    def check(model):
        before = snapshot(model)
        yield
        assert_unchanged(model, before)

    return check
