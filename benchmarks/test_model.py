"""Whole models at a fixed output length: TTFT, TPOT, TTLT and tokens/s by width; on a GPU also memory and joules.

The full set needs a GPU. It uses random weights with the shapes of Llama-3.2-1B and 3B, and measures the same as
`gluprune bench`, in parts that `-k` selects: `I4916-graph` is one width, decoding with a CUDA graph.
SmolLM2-135M-Instruct is timed on every machine, its widths in turns, so that temporary load affects all of them.
"""

import functools

import pytest

from benchmarks.lib.shapes import all_widths, paper_widths
from gluprune.checkpoints.load_save import load
from gluprune.demo.smollm2 import NAME, smollm2_checkpoint
from gluprune.measure import bench
from gluprune.measure.bench import BenchPlan, Workload
from gluprune.measure.decoding import GenerationTiming, make_generator, time_generator
from gluprune.measure.random_models import CONFIGS, random_model

SHORT, LONG = (tuple(Workload(batch, prompt, 64) for batch in (1, 8)) for prompt in (128, 1024))
PLANS = {
    "called": BenchPlan(SHORT, ("generate", "graph_decoding"), repeats=3, energy_seconds=2.0, idle_seconds=3.0),
    "static": BenchPlan(SHORT, ("static",), repeats=3, energy_seconds=2.0, idle_seconds=3.0),
    "graph": BenchPlan(SHORT, ("graph",), repeats=3, energy_seconds=None),
    "energy": BenchPlan(SHORT[1:], ("graph",), repeats=1, energy_seconds=2.0, idle_seconds=3.0),
    "generate": BenchPlan(SHORT[:1], ("generate",), repeats=3, energy_seconds=None),
    "long": BenchPlan(LONG, ("graph",), energy_seconds=None),
    "compiled": BenchPlan(SHORT[:1], ("compiled",), energy_seconds=None),
}
CASES = [
    (name, width, plan)
    for name in ("llama-3.2-1b", "llama-3.2-3b")
    for width in all_widths(CONFIGS[name].intermediate_size)
    for plan in PLANS
]
WORKLOAD = Workload(1, 128, 17)
ROUNDS = {"full": 15, "reduced": 7, "tiny": 1}


@functools.lru_cache(maxsize=1)
def dense(name, dtype):
    return random_model(name, dtype)


@functools.lru_cache(maxsize=1)
def narrowed(name, dtype, width, device):
    return bench.narrowed(dense(name, dtype), width).to(device)


@pytest.fixture(scope="module")
def meter_and_idle(device):
    """The energy meter and the idle power, measured once, before any benchmark."""
    return bench.calibrated_meter(device, PLANS["energy"])


@pytest.mark.large
@pytest.mark.parametrize("name, width, plan", CASES, ids=[f"{name}-I{width}-{plan}" for name, width, plan in CASES])
def test_llama(benchmark, shapes, device, meter_and_idle, keep, name, width, plan):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")

    def measure():
        model = narrowed(name, shapes.dtype, width, device)
        for records in bench.bench_model(model, f"{name}, random weights", PLANS[plan], *meter_and_idle):
            for record in records:
                keep(record)

    benchmark.pedantic(measure, rounds=1)


def test_smollm2(benchmark, request, shapes, device, keep):
    model = load(smollm2_checkpoint(), dtype=shapes.dtype).eval()
    original = model.config.intermediate_size
    set_name = request.config.getoption("--shapes")
    widths = (original, *paper_widths(original)) if set_name != "tiny" else (original, 615)
    models = {width: bench.narrowed(model, width).to(device) for width in widths}
    prompt = bench.random_prompts(models[original], WORKLOAD, seed=0, count=1)[0]
    generators = {w: make_generator("generate", narrow, prompt, WORKLOAD.new_tokens) for w, narrow in models.items()}
    timings = {width: [] for width in models}

    def one_round():
        for width, generator in generators.items():
            timings[width].append(time_generator(generator, [prompt], WORKLOAD.new_tokens))

    benchmark.pedantic(one_round, rounds=ROUNDS[set_name])
    for width, runs in timings.items():
        ttfts, ttlts = zip(*((run.ttft, run.ttlt) for run in runs), strict=True)
        timing = GenerationTiming(WORKLOAD.batch, WORKLOAD.prompt, WORKLOAD.new_tokens, ttfts, ttlts)
        common = bench.described(models[width], NAME, bench.STOCK, "generate", WORKLOAD)
        for record in bench.timing_records(timing, common, bench.weight_bytes(models[width])):
            keep(record)
        benchmark.extra_info[f"{width} neurons, ms"] = f"TTFT {1e3 * timing.ttft:.1f}, TPOT {1e3 * timing.tpot:.2f}"
