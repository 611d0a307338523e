"""Models and batches for the tests of reconstruction."""

import copy

import torch

import gluprune
from gluprune.models.families import FAMILIES

DIRECT = [name for name, family in FAMILIES.items() if not family.normalized]


def random_batches(shapes=((3, 40), (1, 25), (4, 31)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, shape, generator=generator) for shape in shapes]


def padded_batches():
    """Batches with padding on both sides and in the middle, a row of only padding, and a batch without a mask."""
    first, second, third = random_batches()
    mask = torch.ones_like(first)
    mask[0, :7] = mask[1, 33:] = mask[2, 5:9] = 0
    nothing = torch.ones_like(third)
    nothing[1] = 0
    return [(first, mask), second, {"input_ids": third, "attention_mask": nothing}]


def narrowed(dense, **how):
    pruned = copy.deepcopy(dense)
    gluprune.prune(pruned, multiple_of=1, **{"intermediate_size": 33, "score": "maw_gud", **how})
    return pruned
