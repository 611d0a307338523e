"""The benchmarks' timer on a scripted clock: time per step, order of runs, and cancellation of drift."""

import statistics

import pytest
import torch

from benchmarks.lib import timing
from benchmarks.lib.shapes import SETS, aligned, all_widths, paper_widths

CPU = torch.device("cpu")


class Machine:
    """A clock that advances only during work, at a speed that may change."""

    def __init__(self, slowness=lambda now: 1.0):
        self.now, self.slowness, self.ran = 0.0, slowness, []

    def clock(self):
        return self.now

    def work(self, name, seconds):
        def step():
            self.ran.append(name)
            self.now += seconds * self.slowness(self.now)

        return step


def test_seconds_per_step():
    """Known sleeps: the mean over the layers, without the warm-up."""
    machine = Machine()
    run = timing.prepare([machine.work("short", 0.25), machine.work("long", 0.75)], CPU, machine.clock)
    assert machine.ran == ["short", "long"] and machine.now == 1.0
    assert run() == 0.5 and run() == 0.5
    assert machine.ran == ["short", "long"] * 3


def measured(machine, seconds, repeats=9):
    passes = {name: timing.prepare([machine.work(name, s)], CPU, machine.clock) for name, s in seconds.items()}
    machine.ran.clear()
    return timing.in_turns(passes, repeats)


def test_each_provider_once_per_round_in_random_order():
    machine = Machine()
    times = measured(machine, {"a": 1.0, "b": 2.0, "c": 4.0})
    assert times == {"a": [1.0] * 9, "b": [2.0] * 9, "c": [4.0] * 9}
    rounds = [tuple(machine.ran[at : at + 3]) for at in range(0, 27, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) >= 4


@pytest.mark.parametrize("order", ["abc", "bca", "cba"])
def test_order_does_not_change_ranks_on_a_drifting_machine(order):
    """The machine slows down to half its speed: the provider listed first is not favoured."""
    seconds = {"a": 1.0, "b": 1.1, "c": 1.2}
    times = measured(Machine(lambda now: 1 + now / 90), {name: seconds[name] for name in order}, repeats=27)
    medians = {name: statistics.median(values) for name, values in times.items()}
    assert sorted(medians, key=medians.get) == ["a", "b", "c"]


def test_layers_past_the_cache():
    for layer, cache in ((40, 50), (100, 50), (1, 50), (25, 50)):
        count = timing.layers_past_the_cache(layer, cache)
        assert count >= 4 and count * layer > 2 * cache
    assert timing.layers_past_the_cache(100, 50) == 4
    assert timing.last_level_cache(CPU) > 1 << 19


def test_widths_of_the_study():
    assert paper_widths(8192) == (7373, 6554, 5735, 4916, 4096, 3277)
    assert [aligned(width) for width in paper_widths(8192)] == [7424, 6528, 5760, 4864, 4096, 3328]
    assert aligned(1) == 128
    assert len(all_widths(8192)) == 12 and all_widths(8192)[0] == 8192


def test_full_set_is_the_whole_grid():
    full = SETS["full"]
    cases = full.cases(full.tokens)
    assert len(cases) == len(set(cases)) == 2 * 12 * 8
    assert {M for *_, M in cases} == {1, 8, 16, 64, 128, 512, 2048, 8192}
    assert {H for _, H, _, _ in cases} == {2048, 3072} and full.training_tokens == full.tokens
