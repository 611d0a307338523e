"""Batches and gradients for the tests of sensitivities."""

import torch


def random_batches(shapes=((3, 11), (1, 5), (2, 8)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, shape, generator=generator) for shape in shapes]


def choose_labels(monkeypatch, choose):
    """Replace randomly drawn labels with labels that the test chooses."""
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: choose(p)[:, None])
