"""The GLU MLP, forward and forward with backward: all providers in turns, over more weights than fit into the cache."""

from benchmarks.lib.mlp import BACKWARD, FORWARD, measure


def test_forward(benchmark, case, device, shapes, ceilings, providers, keep):
    options = dict(shapes=shapes, ceilings=ceilings, providers=providers, keep=keep)
    assert benchmark.pedantic(measure, args=(FORWARD, case, device), kwargs=options, rounds=1) == {}


def test_backward(benchmark, training_case, device, shapes, ceilings, providers, keep):
    options = dict(shapes=shapes, ceilings=ceilings, providers=providers, keep=keep)
    assert benchmark.pedantic(measure, args=(BACKWARD, training_case, device), kwargs=options, rounds=1) == {}
