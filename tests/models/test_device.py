"""Where a model runs: the choice of a device, without one."""

import pytest
import torch

from gluprune.models.device import choose_device, loading_options


@pytest.fixture
def gpus(monkeypatch):
    """Lets torch find so many GPUs."""

    def find(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return find


@pytest.mark.parametrize("count, device", [(0, "cpu"), (1, "cuda"), (8, "cuda")])
def test_auto_is_cuda_if_available(gpus, count, device):
    gpus(count)
    assert choose_device() == torch.device(device)


def test_a_named_device(gpus):
    gpus(2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    "count, name, message",
    [
        (0, "cuda", "device 'cuda' is not available: torch does not find a CUDA device"),
        (2, "cuda:2", "device 'cuda:2' is not available: torch finds 2 CUDA devices"),
        (1, "gpu", "unknown device 'gpu'; allowed: auto, cpu, cuda"),
        (1, "mps", "unknown device 'mps'; allowed: auto, cpu, cuda"),
    ],
)
def test_a_device_that_is_not_there(gpus, count, name, message):
    gpus(count)
    with pytest.raises(ValueError, match=message):
        loading_options(name)


@pytest.mark.parametrize(
    "count, name, options",
    [
        (0, "auto", {}),
        (1, "cpu", {}),
        (1, "auto", {"device_map": "cuda"}),
        (4, "auto", {"device_map": "sequential"}),  # a model that does not fit on one GPU continues on the next
        (4, "cuda:3", {"device_map": "cuda:3"}),
    ],
)
def test_loading_options(gpus, count, name, options):
    gpus(count)
    assert loading_options(name) == options
