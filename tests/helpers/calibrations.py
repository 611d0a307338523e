"""Batches for the tests of calibration."""

import torch

from gluprune.models.glu import model_glus


def random_batches(shapes=((3, 11), (1, 5), (2, 8), (4, 9)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, shape, generator=generator) for shape in shapes]


def captured(model, sequences):
    """X `[T, I]` in float64 of every layer: each sequence `[S]` is run separately, with hooks defined here."""
    glus = model_glus(model)
    taken = [[] for _ in glus]
    handles = [
        glu.down.register_forward_pre_hook(lambda _, arguments, into=into: into.append(arguments[0][0].double()))
        for glu, into in zip(glus, taken)
    ]
    with torch.no_grad():
        for sequence in sequences:
            model(sequence[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(rows) for rows in taken]


def arguments(**given):
    return dict({"pruning_ratio": 0.3, "multiple_of": 1, "score": "hybrid"}, **given)
