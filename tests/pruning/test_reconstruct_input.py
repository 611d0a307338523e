"""Reconstruction: what is rejected."""

import copy

import pytest
import torch

from gluprune.models.glu import decoder_layers, model_glus
from gluprune.pruning.reconstruct import reconstruct
from gluprune.pruning.residual import Normalized, path_of
from gluprune.runtime.patching import patch
from tests.helpers.reconstructions import NORMS, narrowed, padded_batches, random_batches, spread_norms
from tests.helpers.tiny_models import make_tiny_model


def test_how_outputs_reach_the_residual_stream(family_name):
    """Any other output of the down projection changes the layer's output by the difference of what `added` returns."""
    settings = {"residual_multiplier": 0.3} if family_name == "granite" else {}
    model = spread_norms(make_tiny_model(family_name, seed=3, **settings)).double()
    glu, layer = model_glus(model)[1], decoder_layers(model)[1]
    path = path_of(layer, glu)
    assert isinstance(path, Normalized) == (family_name in NORMS)
    outputs, written = [], []
    layer.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    handle = glu.down.register_forward_hook(lambda module, arguments, output: written.append(output))
    ids = random_batches()[0]
    with torch.no_grad():
        model(ids)
        handle.remove()
        other = torch.randn(written[0].shape, dtype=torch.float64) * torch.rand(*written[0].shape[:2], 1)
        glu.down.register_forward_hook(lambda module, arguments, output: other)
        model(ids)
    # The families' norms compute in float32.
    difference = path.added(other) - path.added(written[0])
    torch.testing.assert_close(outputs[1] - outputs[0], difference, rtol=0, atol=1e-5 * difference.abs().max().item())


@pytest.mark.parametrize(
    "other, message",
    [
        (
            {"num_hidden_layers": 2},
            "pruned is llama with 3 layers, hidden size 32, 64 tokens; dense is llama with 2 layers",
        ),
        ({"hidden_size": 64}, "dense is llama with 3 layers, hidden size 64, 64 tokens"),
        ({"vocab_size": 70}, "dense is llama with 3 layers, hidden size 32, 70 tokens"),
        ({"model_type": "qwen3"}, "dense is qwen3 with 3 layers, hidden size 32, 64 tokens"),
        ({"intermediate_size": 32}, "layer 0 has 33 neurons in pruned, 32 in dense"),
    ],
)
def test_models_that_do_not_match(other, message, unchanged):
    pruned = narrowed(make_tiny_model())
    with unchanged(pruned), pytest.raises(ValueError, match=message):
        reconstruct(pruned, make_tiny_model(**other), random_batches())


def test_identical_models_and_shared_weights(unchanged):
    dense = make_tiny_model()
    pruned = copy.deepcopy(dense)
    pruned.model.layers[1].mlp.down_proj.weight = dense.model.layers[1].mlp.down_proj.weight
    for other, layer in ((pruned, 0), (dense, 1)):
        with unchanged(pruned), pytest.raises(ValueError, match=f"pruned and dense share the weights of layer {layer}"):
            reconstruct(pruned, other, random_batches())


def test_unloaded_models(unchanged):
    dense = make_tiny_model()
    pruned = narrowed(dense)
    with unchanged(pruned), pytest.raises(ValueError, match="dense is on the meta device"):
        reconstruct(pruned, dense.to("meta"), random_batches())
    with pytest.raises(ValueError, match="layer 0, gate_proj is on the meta device"):
        reconstruct(narrowed(make_tiny_model()).to("meta"), make_tiny_model(), random_batches())


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "calibration holds no tokens"),
        ([torch.ones(1, 40, dtype=torch.int64)], "calibration holds one row of text"),
        ([torch.full((2, 5), 64)], "token ids from 64 to 64; the model's vocabulary goes from 0 to 63"),
    ],
)
def test_unusable_text(batches, message, unchanged):
    dense = make_tiny_model()
    pruned = narrowed(dense)
    with unchanged(pruned), pytest.raises(ValueError, match=message):
        reconstruct(pruned, dense, batches)


@pytest.mark.cuda
@pytest.mark.parametrize("dense_device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_patched", [False, True])
def test_same_on_cuda_as_on_the_cpu(dense_device, is_patched):
    dense, batches = make_tiny_model(seed=3, initializer_range=0.15), padded_batches()
    pruned = narrowed(dense)
    found = copy.deepcopy(pruned).cuda()
    if is_patched:
        patch(found)
    reconstruct(pruned, dense, batches)
    reconstruct(found, dense.to(dense_device), batches)
    for glu, other in zip(model_glus(found), model_glus(pruned)):
        assert glu.down.weight.is_cuda
        largest = other.down.weight.abs().max().item()
        torch.testing.assert_close(glu.down.weight.cpu(), other.down.weight, rtol=0, atol=2e-3 * largest)
