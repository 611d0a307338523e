"""The timer: a sleep and a kernel with known work, the order of providers, a repeated run."""

import time

import pytest
import torch

from benchmarks.lib import timing
from gluprune.measure.records import Record

SLEEP = 0.01
REPEATS = 31


@pytest.fixture
def products(device, shapes):
    """Matrix products with one, two and four times the work; on a CPU with one thread, which is disturbed least."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    n = 2048 if device.type == "cuda" else 128  # short enough for one time slice of a busy CPU
    a = torch.randn(n, n, device=device).to(shapes.dtype)
    wide = [torch.randn(n, n * factor, device=device).to(shapes.dtype) for factor in (1, 2, 4)]
    yield {f"{factor} x": [lambda b=b: a @ b] * 4 for factor, b in zip((1, 2, 4), wide, strict=True)}
    torch.set_num_threads(threads)


def measured(steps, device, names=None):
    passes = {name: timing.prepare(steps[name], device) for name in names or steps}
    return timing.in_turns(passes, REPEATS)


def test_known_sleep(benchmark, keep, shapes):
    cpu = torch.device("cpu")
    times = benchmark.pedantic(measured, args=({"sleep": [lambda: time.sleep(SLEEP)]}, cpu), rounds=1)["sleep"]
    keep(record := Record.of("timer: sleep", "time.sleep", {"seconds": SLEEP}, shapes.dtype, unit="s", values=times))
    assert SLEEP <= record.p50 < 1.05 * SLEEP  # a sleep can end late, but never early


def test_known_kernel(benchmark, keep, shapes, device, products):
    """Twice the work takes twice the time; overhead of the timer would show at the smallest work.

    The shortest times are compared, since other load on the machine disturbs them least.
    """
    times = benchmark.pedantic(measured, args=(products, device), rounds=1)
    found = {}
    for name, values in times.items():
        shape = {"work": name, "kernel": "matrix product"}
        keep(Record.of("timer: known kernel", "torch", shape, shapes.dtype, unit="s", values=values))
        found[name] = min(values)
    assert found["2 x"] / found["1 x"] == pytest.approx(2, rel=0.25)
    assert found["4 x"] / found["2 x"] == pytest.approx(2, rel=0.25)


def test_order_and_repetition(benchmark, device, products):
    """Ranks do not depend on the order of providers, and two runs agree within their spread."""

    def both_ways():
        return measured(products, device), measured(products, device, list(reversed(products)))

    runs = benchmark.pedantic(both_ways, rounds=1)
    first, second = ({name: sorted(values) for name, values in run.items()} for run in runs)
    for run in (first, second):
        assert sorted(run, key=lambda name: run[name][0]) == ["1 x", "2 x", "4 x"]
    for name in products:  # the p20-p80 ranges overlap
        low, high = REPEATS // 5, REPEATS - 1 - REPEATS // 5
        assert first[name][low] <= second[name][high] and second[name][low] <= first[name][high], name
