"""The recommended recipe by stage: seconds and peak memory of calibration, pruning and reconstruction.

The full set uses random weights with the shapes of Llama-3.2-1B and needs a GPU; SmolLM2-135M-Instruct runs on every
machine. Tokens are random: time and memory do not depend on them.
"""

import copy
import functools
import time

import pytest
import torch

import gluprune
from gluprune.checkpoints.load_save import load
from gluprune.demo.smollm2 import NAME, smollm2_checkpoint
from gluprune.measure.memory import PeakMemory
from gluprune.measure.random_models import random_model
from gluprune.measure.records import Record

LARGE = "llama-3.2-1b"
LENGTH = 512


def stages(dense, batches):
    """Yield the name of each stage and its work."""
    results = {}
    pruned = copy.deepcopy(dense)

    def calibrate():
        results["statistics"] = gluprune.calibrate(dense, batches, sensitivity=True)

    def prune():
        gluprune.prune(
            pruned, pruning_ratio=0.4, score="surgeon", compensate=True, calibration=results.pop("statistics")
        )

    yield "calibrate", calibrate
    yield "prune", prune
    yield "reconstruct", functools.partial(gluprune.reconstruct, pruned, dense, batches)


def measure(dense, windows, model, keep):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, dense.config.vocab_size, (windows, LENGTH), generator=generator)
    shape = {"model": model, "windows": windows, "window": LENGTH}
    for name, work in stages(dense, ids.split(1)):
        peak = PeakMemory(dense)
        start = time.perf_counter()
        work()
        if dense.device.type == "cuda":
            torch.cuda.synchronize(dense.device)
        seconds = time.perf_counter() - start
        keep(Record.of(f"recipe: time to {name}", "gluprune", shape, dense.dtype, unit="s", values=[seconds]))
        if dense.device.type == "cuda":  # elsewhere, a stage would have to run twice
            nbytes, method = peak.read(work)
            what = f"recipe: peak memory to {name}"
            keep(Record.of(what, "gluprune", shape, dense.dtype, unit="bytes", values=[nbytes], method=method))


@pytest.mark.large
def test_large(benchmark, device, keep):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    dense = random_model(LARGE).to(device)
    benchmark.pedantic(measure, args=(dense, 32, f"{LARGE}, random weights", keep), rounds=1)


def test_smollm2(benchmark, request, device, keep):
    dense = load(smollm2_checkpoint(), dtype=torch.float32).eval().to(device)
    windows = 2 if request.config.getoption("--shapes") == "tiny" else 4
    benchmark.pedantic(measure, args=(dense, windows, NAME, keep), rounds=1)
