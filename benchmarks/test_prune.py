"""`gluprune.prune` compared with OptiPFair's `prune_model`: equal weights, then time and memory."""

import copy
import logging
import statistics
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import gluprune
from gluprune.demo.smollm2 import smollm2_checkpoint
from gluprune.measure.random_models import CONFIGS, random_model
from gluprune.measure.records import Record

optipfair = pytest.importorskip("optipfair")

PERCENT = 40
LARGE = "random weights of Llama-3.2-1B's shapes"
MODELS = {
    "SmolLM2-135M-Instruct": lambda: AutoModelForCausalLM.from_pretrained(smollm2_checkpoint()),
    LARGE: lambda: random_model("llama-3.2-1b"),
}
PROVIDERS = {
    "gluprune": lambda model: gluprune.prune(model, pruning_ratio=PERCENT / 100, score="maw", multiple_of=1),
    "optipfair": lambda model: optipfair.prune_model(
        model, neuron_selection_method="PPM", pruning_percentage=PERCENT, show_progress=False
    ),
}


def timed(provider, model):
    start = time.perf_counter()
    PROVIDERS[provider](model)
    return time.perf_counter() - start


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", pytest.param(LARGE, marks=pytest.mark.large)])
def test_time(benchmark, keep, name):
    """Both in turns in one run, after one warm-up, each time on a new copy of the model."""
    logging.disable(logging.INFO)
    dense = MODELS[name]()
    results = {provider: copy.deepcopy(dense) for provider in PROVIDERS}
    for provider, model in results.items():  # the warm-up is also the correctness check
        PROVIDERS[provider](model)
    theirs = results["optipfair"].state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in results["gluprune"].state_dict().items())
    del results, theirs

    shape = {"model": name, "pruning_percent": PERCENT}
    times = {provider: [] for provider in PROVIDERS}
    for _ in range(7):
        for provider, values in times.items():
            values.append(timed(provider, copy.deepcopy(dense)))
    for provider, values in times.items():
        keep(Record.of("prune: time", provider, shape, dense.dtype, unit="s", values=values))
    medians = {provider: statistics.median(values) for provider, values in times.items()}
    benchmark.extra_info["optipfair / gluprune"] = medians["optipfair"] / medians["gluprune"]
    benchmark.pedantic(timed, setup=lambda: (("gluprune", copy.deepcopy(dense)), {}), rounds=3)


MEMORY_SCRIPT = """
import logging, sys
from benchmarks.test_prune import MODELS, PROVIDERS

logging.disable(logging.INFO)
model = MODELS[sys.argv[1]]()
def peak():  # of this process only: getrusage would return its parent's, if that is larger
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before = peak()
PROVIDERS[sys.argv[2]](model)
print(peak() - before)
"""


@pytest.mark.large
def test_memory(benchmark, keep):
    """Peak resident memory beyond the model, each provider in a separate process."""
    name = LARGE
    config = CONFIGS["llama-3.2-1b"]
    layer = 3 * config.hidden_size * config.intermediate_size * 2

    def measure(provider):
        command = [sys.executable, "-c", MEMORY_SCRIPT, name, provider]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    above = {provider: measure(provider) for provider in PROVIDERS}
    for provider, value in above.items():
        benchmark.extra_info[f"{provider}: layers' MLP weights"] = value / layer
        shape = {"model": name, "pruning_percent": PERCENT, "bytes of one layer's MLP": layer}
        keep(
            Record.of(
                "prune: peak memory above the model", provider, shape, torch.bfloat16, unit="bytes", values=[value]
            )
        )
    assert above["gluprune"] < 2 * layer
    benchmark.pedantic(measure, args=("gluprune",), rounds=1)
