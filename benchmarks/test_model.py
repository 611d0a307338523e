"""Whole models at forced length: TTFT, TPOT, TTLT, tokens/s, peak memory and joules against the width.

On a GPU random weights of the shapes of Llama-3.2-1B and 3B, every width a test of its own (minutes: choose with `-k`). On a
CPU SmolLM2-135M-Instruct. What is measured is what `gluprune bench` measures.
"""

import functools
import statistics

import pytest

from benchmarks.shapes import all_widths
from gluprune.bench import Plan, Workload, bench_width, calibrated_meter
from gluprune.checkpoint import load
from gluprune.random_models import CONFIGS, random_model
from gluprune.smollm2 import NAME, smollm2_checkpoint

DECODINGS = ("generate", "compiled", "graph")
# By set of shapes: the plan, and the widths of each model.
PLANS = {
    "full": (
        Plan(tuple(Workload(batch, prompt, 64) for batch in (1, 8) for prompt in (128, 1024)), DECODINGS),
        {name: all_widths(CONFIGS[name].intermediate_size) for name in ("llama-3.2-1b", "llama-3.2-3b")},
    ),
    "reduced": (Plan((Workload(1, 128, 24),), ("generate",), repeats=9), {NAME: all_widths(1536)}),
    "tiny": (
        Plan((Workload(1, 8, 2),), ("generate",), repeats=1, energy_seconds=1, idle_seconds=1),
        {NAME: [1536, 615]},
    ),
}


def pytest_generate_tests(metafunc):
    _, models = PLANS[metafunc.config.getoption("--shapes")]
    metafunc.parametrize("name, width", [(name, width) for name, widths in models.items() for width in widths])


@functools.lru_cache(maxsize=1)
def dense(name, dtype):
    """The model in memory, one at a time, and what the records call it."""
    if name == NAME:
        return load(smollm2_checkpoint(), dtype=dtype).eval(), NAME
    return random_model(name, dtype), f"{name}, random weights"


@pytest.fixture(scope="module")
def plan(request):
    return PLANS[request.config.getoption("--shapes")][0]


@pytest.fixture(scope="module")
def meter_and_idle(device, plan):
    """Measured once, before anything runs."""
    return calibrated_meter(device, plan)


def test_generation(benchmark, shapes, device, plan, meter_and_idle, keep, name, width):
    if device.type != "cuda" and "graph" in plan.decodings:
        pytest.skip("the full set of model benchmarks needs a CUDA device")
    made = []

    def measure():
        for records in bench_width(*dense(name, shapes.dtype), width, plan, device, *meter_and_idle):
            made.extend(records)
            for record in records:
                keep(record)

    benchmark.pedantic(measure, rounds=1)
    for what in ("TTFT", "TPOT"):
        values = [record.p50 for record in made if record.what == f"generation: {what}"]
        benchmark.extra_info[f"{what}, ms, median of the cells"] = 1e3 * statistics.median(values)
