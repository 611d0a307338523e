"""Reconstruction compared with float64 least squares, layer by layer, on whole forward passes."""

import copy
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from gluprune.calibration.least_squares import RIDGE
from gluprune.models.glu import decoder_layers, model_glus
from gluprune.pruning.history import steps_of
from gluprune.pruning.reconstruct import _shrunk_fit, reconstruct
from gluprune.runtime import aligned
from gluprune.runtime.patching import patch
from tests.helpers.marks import each_family, slow
from tests.helpers.reconstructions import (
    NORMS,
    narrowed,
    output_norms,
    padded_batches,
    random_batches,
    spread_norms,
)
from tests.helpers.tiny_models import assert_unchanged, make_tiny_model, snapshot


def masked_rows(batches):
    """Ids `[1, S]` and mask `[1, S]` of every row that is not all padding."""
    for batch in batches:
        ids, mask = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch, None)
        mask = torch.ones_like(ids) if mask is None else mask
        yield from (row for row in zip(ids.split(1), mask.split(1)) if row[1].any())


@torch.no_grad()
def seen(model, index, rows):
    """Inputs and outputs of a layer's down projection and outputs of the layer, for each row, from whole forwards."""
    found = []
    glu, layer = model_glus(model)[index], decoder_layers(model)[index]
    for ids, mask in rows:
        x, y, h = [], [], []
        handles = [
            glu.down.register_forward_pre_hook(lambda module, arguments, x=x: x.append(arguments[0][0])),
            glu.down.register_forward_hook(lambda module, arguments, output, y=y: y.append(output[0])),
            layer.register_forward_hook(lambda module, arguments, output, h=h: h.append(output[0])),
        ]
        model(ids, attention_mask=mask)
        for handle in handles:
            handle.remove()
        found.append([one[0][mask[0] != 0] for one in (x, y, h)])
    return found


def ridge(x, e):
    """argmin ||e - x d||^2 + lambda ||d||^2, solved as one stacked problem."""
    weight = RIDGE * x.square().sum(0).mean()
    rows = torch.cat([x, weight.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([e, torch.zeros(x.shape[1], e.shape[1], dtype=e.dtype)])).solution


def expected(pruned, dense, batches, scale=1.0):
    """Expected down projections (float64) and factors; each layer is solved after the layers before it are replaced."""
    pruned, dense = copy.deepcopy(pruned).double(), copy.deepcopy(dense).double()
    rows = list(masked_rows(batches))
    offset = NORMS.get(dense.config.model_type, ("", 0))[1]
    weights, factors = [], []
    for index, (glu, norm) in enumerate(zip(model_glus(pruned), output_norms(pruned))):
        both = zip(seen(pruned, index, rows), seen(dense, index, rows))
        data = [(x, y, (aim - found) / scale) for (x, y, found), (_, _, aim) in both]
        w = torch.ones((), dtype=torch.float64) if norm is None else norm.weight.data + offset
        if norm is not None:  # what the norm makes of an output of size 1, per token, and the errors before it
            sizes = [(y.square().mean(1, keepdim=True) + 1e-6).sqrt() for _, y, _ in data]
            e_of = [e * w / (w**2 + 0.01 * (w**2).mean()) for _, _, e in data]
            data = [(x / r, y, e) for (x, y, _), r, e in zip(data, sizes, e_of)]
        data = [(x, e) for x, _, e in data]
        halves = [[torch.cat(of) for of in zip(*data[parity::2])] for parity in (0, 1)]
        (x_a, e_a), (x_b, e_b) = halves
        on_b, on_a = x_b @ ridge(x_a, e_a), x_a @ ridge(x_b, e_b)
        on_b, on_a, e_b, e_a = (w * values for values in (on_b, on_a, e_b, e_a))  # in the residual stream
        share = ((on_b * e_b).sum() + (on_a * e_a).sum()) / (on_b.square().sum() + on_a.square().sum())
        share = share.clamp(0, 1).item()
        factors.append(2 * share / (1 + share))
        change = factors[-1] * ridge(*(torch.cat([half[part] for half in halves]) for part in (0, 1)))
        glu.down.weight.data += change.T
        weights.append(glu.down.weight.data)
    return weights, factors


@pytest.mark.parametrize("make_batches", [padded_batches, *slow(random_batches)])
@pytest.mark.parametrize("family", each_family())
def test_every_layer_is_the_least_squares_solution(family, make_batches):
    granite = {"residual_multiplier": 0.3} if family == "granite" else {}
    dense = spread_norms(make_tiny_model(family, seed=3, initializer_range=0.15, attention_dropout=0.5, **granite))
    # In float64, which the reference runs in, the eager attention of gemma2 has NaN at padding.
    batches = random_batches() if family == "gemma2" else make_batches()
    pruned = narrowed(dense)
    before, dense_before = snapshot(pruned), snapshot(dense)
    wanted, factors = expected(pruned, dense, batches, scale=granite.get("residual_multiplier", 1.0))
    assert max(factors) > 0.1, "the case must need a correction"
    pruned.train()
    dense.model.layers[1].train()
    reconstruct(pruned, dense, batches)
    assert all(module.training for module in pruned.modules())
    assert next(module for module in dense.modules() if module.training) is dense.model.layers[1]
    dense.eval()
    pruned.eval()
    assert_unchanged(dense, dense_before)
    for glu, weight in zip(model_glus(pruned), wanted):
        # Gram matrices in float32, condition at most 100 * 33: errors stay near 3300 * 1.2e-7.
        torch.testing.assert_close(glu.down.weight.data.double(), weight, rtol=0, atol=5e-4 * weight.abs().max().item())
    assert [step["step"] for step in steps_of(pruned)] == ["prune", "reconstruct"]
    pruned.gluprune_steps = steps_of(pruned)[:1]  # all that changes besides the weights
    after = snapshot(pruned)
    assert all(after[part] == value for part, value in before.items() if not part.endswith("down_proj.weight"))


@pytest.mark.parametrize("family", ["llama", *NORMS])
def test_outputs_match_the_dense_model_better(family):
    """On held-out text of the same kind, where the last layers of the pruned and the dense model differed a lot."""
    dense = make_tiny_model(family, seed=3, initializer_range=0.15)
    pruned = narrowed(dense, intermediate_size=80)
    rows = list(masked_rows(random_batches(seed=1)))
    aims = [h for _, _, h in seen(dense, 2, rows)]

    def distance():
        return sum((h - aim).square().sum().item() for (_, _, h), aim in zip(seen(pruned, 2, rows), aims))

    far = distance()
    reconstruct(pruned, dense, random_batches(((16, 60),)))
    assert distance() < 0.9 * far


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", each_family())
def test_an_unpruned_model_does_not_change(family, dtype):
    dense = make_tiny_model(family, seed=3, dtype=dtype)
    pruned = copy.deepcopy(dense)
    before = snapshot(pruned)
    reconstruct(pruned, dense, random_batches())
    assert [step["step"] for step in vars(pruned).pop("gluprune_steps")] == ["reconstruct"]
    assert_unchanged(pruned, before)


def test_layers_of_different_widths():
    dense, batches = make_tiny_model(seed=3, initializer_range=0.15), random_batches()
    pruned = narrowed(dense, layers=[0, 2])
    wanted, _ = expected(pruned, dense, batches)
    assert [weight.shape[1] for weight in wanted] == [33, 101, 33]
    reconstruct(pruned, dense, batches)
    for glu, weight in zip(model_glus(pruned), wanted):
        torch.testing.assert_close(glu.down.weight.data.double(), weight, rtol=0, atol=2e-3 * weight.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_match_float32(dtype):
    dense, batches = make_tiny_model(seed=3, initializer_range=0.15, dtype=dtype), random_batches()
    pruned = narrowed(dense)
    plain = [glu.down.weight.data.float() for glu in model_glus(pruned)]
    in_float32 = copy.deepcopy(pruned).float()
    reconstruct(in_float32, copy.deepcopy(dense).float(), batches)
    computed = set()
    for model in (pruned, dense):
        down = model_glus(model)[1].down
        down.register_forward_pre_hook(lambda module, arguments, of=model: computed.add((of, arguments[0].dtype)))
    reconstruct(pruned, dense, batches)
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert computed == {(pruned, expected_dtype), (dense, expected_dtype)}
    for glu, other, before in zip(model_glus(pruned), model_glus(in_float32), plain):
        weight, same = glu.down.weight.data, other.down.weight.data
        assert weight.dtype == dtype
        assert dtype != torch.float64 or not torch.equal(weight.float().double(), weight), "rounded to float32"
        moved = (same - before).norm()
        # bf16 has 8 significant bits for weights and rotary angles, and the changes are smaller than the weights.
        tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
        assert moved > 0 and (weight.float() - same).norm() < tolerance * moved


def test_patched():
    dense, batches = make_tiny_model(seed=3, initializer_range=0.15), random_batches()
    pruned = narrowed(dense)
    same = copy.deepcopy(pruned)
    patch(pruned, "triton")
    parameters = [glu.down.weight for glu in model_glus(pruned)]
    reconstruct(pruned, dense, batches)
    reconstruct(same, dense, batches)
    for glu, other, parameter in zip(model_glus(pruned), model_glus(same), parameters):
        assert glu.down.weight is parameter and torch.equal(glu.down.weight, other.down.weight)
        assert aligned.is_aligned(*glu.weights())


@pytest.mark.parametrize("noise", [1.0, 5.0, 12.0, 200.0])
def test_factor_is_the_best_one(noise):
    """The factor approximates the optimum for infinite text, which is known if e = X D + noise with independent X."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, hidden = 1000, 40, 16
    best, found = [], []
    for _ in range(20):
        aim = torch.randn(width, hidden, generator=generator) / width**0.5
        halves = []
        for _ in range(2):
            x = torch.randn(tokens, width, generator=generator)
            e = x @ aim + noise * torch.randn(tokens, hidden, generator=generator)
            halves.append(SimpleNamespace(gram=x.T @ x, cross=x.T @ e))
        change, factor = _shrunk_fit(*halves, "layer 0")
        fit = torch.linalg.solve(halves[0].gram + halves[1].gram, halves[0].cross + halves[1].cross)
        assert (change - factor * fit).norm() <= 0.02 * fit.norm(), "the ridge changes a percent at most"
        best.append(((fit * aim).sum() / fit.square().sum()).clamp_min(0).item())
        found.append(factor)
    assert sum(found) / 20 == pytest.approx(sum(best) / 20, abs=0.03)


def test_factor_stays_between_0_and_1():
    generator = torch.Generator().manual_seed(0)
    x, aim = torch.randn(50, 7, generator=generator), torch.randn(7, 3, generator=generator)
    gram, cross = x.T @ x, x.T @ x @ aim
    # Halves that contradict each other give factor 0. Without noise only the ridge shrinks the fit: the factor is 1.
    change, factor = _shrunk_fit(SimpleNamespace(gram=gram, cross=cross), SimpleNamespace(gram=gram, cross=-cross), "")
    assert factor == 0 and not change.any()
    half = SimpleNamespace(gram=gram, cross=cross)
    change, factor = _shrunk_fit(half, half, "")
    assert factor == 1 and 0.97 * aim.norm() < change.norm() < aim.norm()


@pytest.mark.parametrize("singular", [0, 1])
def test_a_half_without_a_solution(singular, caplog):
    """If one half of the text is singular with every ridge, the correction is zero and the log says so."""
    halves = [SimpleNamespace(gram=torch.eye(3), cross=torch.ones(3, 2)) for _ in range(2)]
    halves[singular].gram = torch.tensor([[1.0, 1e6, 0], [1e6, 1, 0], [0, 0, 1]])
    change, factor = _shrunk_fit(*halves, "layer 4")
    assert factor == 0 and change.shape == (3, 2) and not change.any()
    assert "layer 4: the Gram matrix is singular with every ridge tried" in caplog.text


@pytest.mark.parametrize("is_patched", [False, True])
def test_failure_in_the_middle(caplog, is_patched):
    """A layer that outputs NaN is named, and nothing changes: no weight, no hook, no forward."""
    dense, batches = make_tiny_model(seed=3, initializer_range=0.15), random_batches()
    pruned = narrowed(dense)
    if is_patched:
        patch(pruned)
    with torch.no_grad():
        dense.model.layers[2].mlp.up_proj.weight[4] = float("nan")
    before, dense_before = snapshot(pruned), snapshot(dense)
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="layer 2 of pruned or dense has NaN or Inf"):
        reconstruct(pruned, dense, batches)
    assert float(re.search(r"layer 1: correction multiplied by ([\d.]+)", caplog.text)[1]) > 0, "it had been changed"
    assert_unchanged(pruned, before)
    assert_unchanged(dense, dense_before)


@pytest.mark.parametrize("row", [0, 1])
def test_nan_in_either_half(row, unchanged):
    dense, (ids,) = make_tiny_model(seed=3), random_batches(((4, 20),))
    pruned = narrowed(dense)
    ids[row, 5] = 2
    with torch.no_grad():
        dense.model.embed_tokens.weight[2] = float("nan")
    with unchanged(pruned), pytest.raises(ValueError, match="layer 0 of pruned or dense has NaN or Inf"):
        reconstruct(pruned, dense, [ids])


def test_failure_before_the_first_layer():
    dense = make_tiny_model(seed=3)
    pruned = narrowed(dense)

    def fail(*_):
        raise RuntimeError("no memory left")

    pruned.model.norm.forward = fail
    before, dense_before = snapshot(pruned), snapshot(dense)
    with pytest.raises(RuntimeError, match="no memory left"):
        reconstruct(pruned, dense, random_batches())
    assert_unchanged(pruned, before)
    assert_unchanged(dense, dense_before)


def test_rows_of_padding_are_ignored():
    """Otherwise half of the text could be empty. One row plus a row of padding is too little text."""
    dense, (ids,) = make_tiny_model(seed=3, initializer_range=0.15), random_batches(((8, 40),))
    pruned = narrowed(dense)
    same = copy.deepcopy(pruned)
    mask = torch.zeros(16, 40, dtype=torch.int64)
    mask[::2] = 1
    reconstruct(pruned, dense, [(ids.repeat_interleave(2, 0), mask)])
    before = same.model.layers[1].mlp.down_proj.weight.clone()
    reconstruct(same, dense, [ids])
    assert not torch.equal(same.model.layers[1].mlp.down_proj.weight, before)
    for glu, other in zip(model_glus(pruned), model_glus(same)):
        torch.testing.assert_close(glu.down.weight, other.down.weight, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="holds one row of text"):
        reconstruct(pruned, dense, [(ids[:2], mask[:2])])


def test_in_inference_mode():
    dense, batches = make_tiny_model(seed=3, initializer_range=0.15), random_batches()
    pruned = narrowed(dense)
    same = copy.deepcopy(pruned)
    with torch.inference_mode():
        reconstruct(pruned, dense, [batch.clone() for batch in batches])
    reconstruct(same, dense, batches)
    for glu, other in zip(model_glus(pruned), model_glus(same)):
        assert torch.equal(glu.down.weight, other.down.weight)
    pruned(batches[0], labels=batches[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_a_replaced_forward_is_kept():
    """accelerate replaces the forward of layers that it moves between devices."""
    dense, batches = make_tiny_model(seed=3), random_batches()
    pruned = narrowed(dense)
    layer, calls = pruned.model.layers[1], []
    forward = layer.forward

    def own(*arguments, **options):
        calls.append(arguments)
        return forward(*arguments, **options)

    layer.forward = own
    reconstruct(pruned, dense, batches)
    assert layer.forward is own and len(calls) == len(batches)
    assert "forward" not in vars(pruned.model.layers[0])
