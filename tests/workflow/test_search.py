"""The search for the narrowest width, against trying all widths."""

import random

import pytest

from gluprune.workflow.search import narrowest


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 0.69])
def test_against_trying_all_widths(shape, limit):
    widths, dense = range(128, 8192, 128), 8192
    seen = []

    def loss(width):
        seen.append(width)
        return 1.5 * (1 - width / dense) ** shape

    expected = min((width for width in widths if loss(width) <= limit), default=None)
    seen.clear()
    assert narrowest(widths, dense, limit, loss) == expected
    assert len(seen) == len(set(seen)) <= 12  # bisection halves 63 widths in 6 steps, and takes turns


def test_a_line_takes_few_measurements():
    seen = []
    narrowest(range(128, 8192, 128), 8192, 0.05, lambda width: seen.append(width) or 1.3 * (1 - width / 8192))
    assert len(seen) <= 4


def test_random_losses():
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    for _ in range(200):
        dense = rng.randrange(2, 60)
        widths = sorted(rng.sample(range(1, dense), rng.randrange(1, dense)))
        losses = dict(zip(widths, sorted((rng.uniform(0, 2) for _ in widths), reverse=True)))
        limit = rng.uniform(0.001, 0.7)
        expected = min((width for width in widths if losses[width] <= limit), default=None)
        assert narrowest(widths, dense, limit, losses.get) == expected, seed


def test_no_width_is_good_enough():
    assert narrowest([1, 2, 3], 4, 0.1, lambda width: 0.2) is None
