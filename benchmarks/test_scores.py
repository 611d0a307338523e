"""Scores of all neurons with a model's shapes, layer after layer; equality is checked first.

On CUDA, gluprune's scores take one kernel launch per layer. On a CPU they use PyTorch operations, in an order that
saves memory traffic.
"""

import torch

from benchmarks.lib import timing
from benchmarks.lib.mlp import random_layers
from gluprune.measure.records import Record
from gluprune.pruning.scores import static_score

SCORES = ("maw", "maw_gud")


def plain(name, gate, up, down):
    """Compute the formula of arXiv 2512.22671 as written."""
    parts = [(gate, 1), (up, 1), (down, 0)][: 3 if name == "maw_gud" else 2]
    return sum(weight.float().amax(dim) + weight.float().amin(dim).abs() for weight, dim in parts)


def measure(name, score_case, device, *, shapes, ceilings, keep):
    model, H, I = score_case
    dtype, method = shapes.dtype, timing.method(device)
    nbytes = (3 if name == "maw_gud" else 2) * H * I * dtype.itemsize
    count = shapes.layers or timing.layers_past_the_cache(nbytes, timing.last_level_cache(device))
    layers = random_layers(count, H, I, dtype, device)
    providers = {"plain PyTorch": plain, "gluprune": static_score}
    assert torch.equal(plain(name, *layers[0]), static_score(name, *layers[0]))
    passes = {
        provider: timing.prepare([lambda layer=layer, score=score: score(name, *layer) for layer in layers], device)
        for provider, score in providers.items()
    }
    for provider, times in timing.in_turns(passes, shapes.repeats).items():
        shape = {"model": model, "score": name, "H": H, "I": I}
        sizes = {"nbytes": nbytes, "floor": ceilings.floor(nbytes, 0), "method": method}
        keep(Record.of("scores", provider, shape, dtype, unit="s", values=times, **sizes))


def test_scores(benchmark, score_case, device, shapes, ceilings, keep):
    def all_scores():
        for name in SCORES:
            measure(name, score_case, device, shapes=shapes, ceilings=ceilings, keep=keep)

    benchmark.pedantic(all_scores, rounds=1)
