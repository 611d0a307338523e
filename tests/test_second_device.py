"""Calibration, pruning, reconstruction, sampling, perplexity and the loss of healing with models on a second device.

The results are those on the CPU, and no operation has tensors of two devices. The device is registered for a whole
process, so the test runs this file as a program.
"""

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils import backend_registration

import gluprune
from gluprune.healing.loss import divergence, hidden_error
from gluprune.pruning import checks
from tests.helpers.processes import ROOT
from tests.helpers.reconstructions import padded_batches, spread_norms
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.tokenizers import byte_tokenizer

FAMILIES = ("llama", "gemma2", "phi3", "qwen3")
RECIPES = (
    {"score": "maw_gud"},
    {"score": "pon", "compensate": True},
    {"score": "surgeon", "compensate": True, "allocation": "sensitivity"},
    {"score": "hybrid"},
)
SIZE = {"pruning_ratio": 0.4, "multiple_of": 1}


def close(found, expected):
    """Check that a tensor is on the second device and has the values of another; strides, and so sums, may differ."""
    assert found.device.type == "second"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def compare(model, expected):
    for found, wanted in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        close(found, wanted)


def check_device():
    there, here = torch.ones(3, device="second"), torch.ones(3)
    close(there + 1, here + 1)
    close(there[torch.tensor([0, 2])], here[:2])
    for mistake in (lambda: there + here, lambda: there @ here, lambda: here[None, :2].index_select(1, there.long())):
        with pytest.raises(RuntimeError, match="others on second"):
            mistake()
    with pytest.raises(TypeError, match="can't convert"):
        there.numpy()


def check_calibration(cpu, second):
    batches = padded_batches()
    expected = gluprune.calibrate(cpu, batches, sensitivity=True)
    found = gluprune.calibrate(second, batches, sensitivity=True)
    for index, layer in expected.layers.items():
        for name, value in vars(layer).items():
            close(getattr(found.layers[index], name), value)
    return expected, found


def check_pruning(cpu, second, statistics):
    for recipe in RECIPES:
        needs_statistics = recipe != {"score": "maw_gud"}
        expected = copy.deepcopy(cpu)
        gluprune.prune(expected, **SIZE, **recipe, calibration=statistics[0] if needs_statistics else None)
        for own in statistics if needs_statistics else (None,):
            pruned = copy.deepcopy(second)
            gluprune.prune(pruned, **SIZE, **recipe, calibration=own)
            compare(pruned, expected)


def check_reconstruction(cpu, second):
    batches, expected = padded_batches(), copy.deepcopy(cpu)
    gluprune.prune(expected, **SIZE)
    gluprune.reconstruct(expected, cpu, batches)
    for dense in (cpu, second):
        found = copy.deepcopy(second)
        gluprune.prune(found, **SIZE)
        gluprune.reconstruct(found, dense, batches)
        compare(found, expected)


def check_text(cpu, second):
    ids = torch.arange(3, 60)
    assert gluprune.perplexity(second, ids, 8) == pytest.approx(gluprune.perplexity(cpu, ids, 8), rel=1e-5)
    texts = [gluprune.sample_text(model, byte_tokenizer(), windows=2, length=6) for model in (cpu, second)]
    assert texts[0] == texts[1]


def check_losses(cpu, second):
    hidden, logits = torch.randn(3, 5, 32), torch.randn(15, 64)
    for wanted, found in zip(losses(cpu, hidden, logits), losses(second, hidden, logits), strict=True):
        close(found, wanted)


def losses(model, hidden, teacher):
    """The loss of healing with both parts, and its gradient by the hidden states."""
    hidden, teacher = hidden.detach().to(model.device).requires_grad_(), teacher.to(model.device)
    loss = divergence(model, hidden, lambda rows: teacher[rows], chunk=4)
    loss = loss + hidden_error([hidden], [hidden.detach() + 1])
    loss.backward()
    return loss.detach(), hidden.grad


def main():
    """Run every check; the device exists in this process only."""
    from tests.helpers import second_device  # noqa: F401

    check_device()
    # Tensors of the second device are of a class of their own, and have no address.
    checks._check_projection = checks._check_not_shared = lambda *_: None
    for family in FAMILIES:
        cpu = spread_norms(make_tiny_model(family, seed=0, initializer_range=0.15))
        second = copy.deepcopy(cpu).to("second")
        statistics = check_calibration(cpu, second)
        check_pruning(cpu, second, statistics)
        check_reconstruction(cpu, second)
        check_text(cpu, second)
        check_losses(cpu, second)
        print(f"{family}: same on both devices")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of PyTorch has no devices that are written in Python",
)
def test_same_on_a_second_device():
    command = [sys.executable, "-m", "tests.test_second_device"]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{family}: same on both devices" for family in FAMILIES]


if __name__ == "__main__":
    main()
