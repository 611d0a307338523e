"""Models and batches for the tests of reconstruction."""

import copy

import torch

import gluprune
from gluprune.models.glu import decoder_layers

# The norm between the MLP and the residual stream, and what is added to its weight.
NORMS = {
    "gemma2": ("post_feedforward_layernorm", 1),
    "gemma3_text": ("post_feedforward_layernorm", 1),
    "olmo2": ("post_feedforward_layernorm", 0),
    "glm4": ("post_mlp_layernorm", 0),
}


def output_norms(model):
    """The norms between the MLPs and the residual stream, of every layer; None where there is none."""
    name, _ = NORMS.get(model.config.model_type, ("", 0))
    return [getattr(layer, name, None) for layer in decoder_layers(model)]


def spread_norms(model, seed=0):
    """Give the norms between MLPs and residual stream weights that differ a lot: from 0 to about 40, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for norm in filter(None, output_norms(model)):
        wanted = torch.randn(norm.weight.shape, generator=generator).exp()
        wanted[:4] = torch.tensor([0.0, 0.01, 40.0, -2.0])
        norm.weight.data.copy_(wanted - NORMS[model.config.model_type][1])
    return model


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
