"""The MLP benchmark on a CPU: providers that are wrong or raise get no time; all others get sizes and floor."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.lib.ceilings import Ceilings
from benchmarks.lib.mlp import BACKWARD, FORWARD, error, measure, random_layers, reference, run
from benchmarks.lib.providers import PROVIDERS, eager, eager_padded
from benchmarks.lib.shapes import SETS
from gluprune.measure.records import read
from gluprune.runtime import operator

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CASE = ("tiny", 64, 153, 5)
CEILINGS = Ceilings(bandwidth=1e9, rate=1e10)


class Scaled(nn.Module):
    """Correct up to a factor, in the forward or the backward pass."""

    def __init__(self, weights, forward=1.0, backward=1.0):
        super().__init__()
        self.mlp, self.factors = eager(weights), (forward, backward)

    def forward(self, x):
        y = self.mlp(x) * self.factors[0]
        return y.detach() + self.factors[1] * (y - y.detach())


class Keeping(nn.Module):
    """Reads the tokens of one call again in all later ones."""

    def __init__(self, weights, call):
        super().__init__()
        self.mlp, self.left, self.kept = eager(weights), call, None

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            self.kept = x
        return self.mlp(x if self.kept is None else self.kept)


def unsupported(weights):
    raise ValueError("width must be a multiple of 8")


def stop(weights):
    raise (
        # without a message
        AssertionError
    )


def generated(weights):
    exec(compile("raise AssertionError", "<generated>", "exec"))  # code without a source file


@pytest.fixture
def kept():
    """Records by provider from one benchmark run with the given providers."""

    def measured(what, **providers):
        records = []
        unexpected = measure(
            what, CASE, CPU, shapes=SETS["tiny"], ceilings=CEILINGS, providers=providers, keep=records.append
        )
        return {record.provider: record for record in records}, unexpected

    return measured


def test_sizes_and_floor(kept):
    found, unexpected = kept(FORWARD, eager=eager)
    record = found["eager"]
    assert unexpected == {} and record.what == FORWARD and record.shape == {"model": "tiny", "H": 64, "I": 153, "M": 5}
    assert record.flops == 6 * 5 * 64 * 153
    assert record.nbytes == 4 * (3 * 64 * 153 + 2 * 5 * 64)  # the weights, x and y in float32
    assert record.floor == pytest.approx(record.nbytes / 1e9) and record.repeats == 3 and record.p50 > 0
    record = kept(BACKWARD, eager=eager)[0]["eager"]
    assert record.flops == 18 * 5 * 64 * 153
    assert record.nbytes == 4 * (9 * 64 * 153 + 4 * 5 * 64)


@pytest.mark.parametrize("what, factors", [(FORWARD, {"forward": 1.001}), (BACKWARD, {"backward": 1.001})])
def test_a_wrong_result_is_not_timed(kept, what, factors):
    found, _ = kept(what, eager=eager, wrong=lambda weights: Scaled(weights, **factors), right=Scaled)
    assert found["wrong"].p50 is None and "ArithmeticError: wrong by 1.0e-03" in found["wrong"].refusal
    assert found["right"].p50 and found["eager"].p50


@pytest.mark.parametrize("call", [1, 2])
def test_a_module_that_reads_the_tokens_of_an_earlier_call_is_not_timed(kept, call):
    found, _ = kept(FORWARD, eager=eager, keeping=lambda weights: Keeping(weights, call))
    assert found["keeping"].p50 is None and "ArithmeticError: wrong by" in found["keeping"].refusal


def test_a_wrong_gradient_does_not_matter_forward(kept):
    assert kept(FORWARD, other=lambda weights: Scaled(weights, backward=2.0))[0]["other"].p50


def test_exceptions_are_on_record(kept):
    found, unexpected = kept(FORWARD, peer=unsupported, silent=stop, sourceless=generated, gluprune=unsupported)
    assert found["peer"].refusal == "ValueError: width must be a multiple of 8"
    assert found["silent"].refusal == "AssertionError: raise AssertionError"  # the statement that raised it
    assert found["sourceless"].refusal == "AssertionError: <generated>, line 1"
    assert found["peer"].method == "wall clock"  # the same table as the others
    assert unexpected == {"gluprune": "ValueError: width must be a multiple of 8"}


def test_a_lost_device_ends_the_run(kept):
    def lost(weights):
        raise torch.AcceleratorError("the device is lost")

    with pytest.raises(torch.AcceleratorError):
        kept(FORWARD, peer=lost)


@pytest.mark.parametrize("what", [FORWARD, BACKWARD])
def test_providers_that_run_here_are_correct(what):
    weights = random_layers(1, 64, 153, torch.float32, CPU)[0]
    training = what == BACKWARD
    x = torch.randn(1, 7, 64).requires_grad_(training)
    grad = torch.randn_like(x) if training else None
    for build in (eager, eager_padded, PROVIDERS["gluprune"]):
        module = build(weights).train(training).requires_grad_(training)
        assert error(run(module, x, grad), reference(weights, x, grad)) < 2e-6
    padded = eager_padded(weights)
    assert padded.gate_proj.weight.shape == (256, 64) and padded.down_proj.weight.shape == (64, 256)
    with pytest.raises(ValueError, match="nothing to pad"):
        eager_padded(random_layers(1, 64, 128, torch.float32, CPU)[0])


def test_fp8_weights_are_compared_with_the_rounded_weights_and_are_bytes(kept):
    records, unexpected = kept(FORWARD, eager=eager, **{"gluprune, fp8": PROVIDERS["gluprune, fp8"]})
    assert unexpected == {} and all(record.p50 for record in records.values())
    assert records["gluprune, fp8"].nbytes == 3 * 64 * 153 + 4 * 2 * 5 * 64
    assert records["eager"].nbytes == 4 * (3 * 64 * 153 + 2 * 5 * 64)
    wrong, _ = kept(FORWARD, eager=PROVIDERS["gluprune, fp8"])
    assert "ArithmeticError: wrong by" in wrong["eager"].refusal  # rounded far beyond the tolerance of float32
    records, unexpected = kept(BACKWARD, eager=eager, **{"gluprune, fp8": PROVIDERS["gluprune, fp8"]})
    assert unexpected == {} and records["gluprune, fp8"].p50 is None and records["eager"].p50


@pytest.mark.skipif(not operator.INTERPRETED, reason="runs in the interpreter")
@pytest.mark.parametrize("name", ["gluprune, triton", "gluprune, cublas"])
def test_forced_paths_run_kernels(name, monkeypatch):
    calls = []
    original = operator.run_kernels
    monkeypatch.setattr(operator, "run_kernels", lambda *arguments: calls.append(arguments[-1]) or original(*arguments))
    weights = random_layers(1, 64, 153, torch.float32, CPU)[0]
    before = [weight.clone() for weight in weights]
    module = PROVIDERS[name](weights).eval().requires_grad_(False)
    x = torch.randn(1, 3, 64)
    assert error(run(module, x, None), reference(weights, x, None)) < 2e-6
    assert calls == [name.partition(", ")[2]]
    assert all(map(torch.equal, weights, before)) and module.down_proj.weight.data_ptr() != weights[2].data_ptr()


def test_error_detects_missing_results():
    exact = torch.ones(2, 3, dtype=torch.float64)
    assert error((torch.ones(2, 3),), (exact,)) == 0
    assert error((torch.full((2, 3), float("nan")),), (exact,)) == float("inf")
    padded = torch.cat([torch.ones(2, 3), torch.full((2, 2), 9.0)], 1)
    assert error((padded,), (exact,)) == 0
    with pytest.raises(ValueError, match=r"shorter|longer"):
        error((), (exact,))


def test_every_provider_of_the_benchmark_is_named():
    assert next(iter(PROVIDERS)) == "eager" and {"LigerSwiGLUMLP", "LigerMLP", "flash-swiglu-mlp"} < set(PROVIDERS)
    assert {name for name in PROVIDERS if name.startswith("gluprune")} == {
        "gluprune",
        "gluprune, cublas",
        "gluprune, triton",
        "gluprune, fp8",
    }


@pytest.mark.slow
def test_a_provider_left_out_has_no_record(tmp_path):
    left_out = [name for name in PROVIDERS if name not in ("eager", "eager, padded")]
    options = [part for name in left_out for part in ("--without", name)]
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/test_mlp.py", "--benchmark-only", "--shapes", "tiny"]
    chosen = ["-k", "forward and M0001 and I153", "--records", str(tmp_path)]
    done = subprocess.run([*command, *chosen, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record.provider for record in read(tmp_path / "mlp.jsonl")] == ["eager", "eager, padded"]
