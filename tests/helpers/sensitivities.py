"""Batches and gradients for the tests of sensitivities."""

import torch


def random_batches(shapes=((3, 11), (1, 5), (2, 8)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, shape, generator=generator) for shape in shapes]


def drawn_from(monkeypatch, choose):
    """Labels that the test can foretell, in place of drawn ones."""
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: choose(p)[:, None])
