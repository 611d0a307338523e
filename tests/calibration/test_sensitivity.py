"""Sensitivities compared with float64: exact divergences, explicit gradients, least squares for each neuron."""

import copy
import weakref

import pytest
import torch

from gluprune.calibration import sensitivity as sensitivity_module
from gluprune.calibration.batches import read_batches
from gluprune.calibration.collect import calibrate
from gluprune.calibration.sensitivity import (
    LayerGradients,
    narrowing_costs,
    output_gradients,
    removed_counts,
    saliencies,
)
from gluprune.models.glu import model_glus
from gluprune.runtime.patching import patch
from tests.helpers.marks import slow
from tests.helpers.sensitivities import choose_labels, random_batches
from tests.helpers.tiny_models import assert_unchanged, make_tiny_model, snapshot


def random_layer(hidden=7, neurons=23, tokens=60, seed=0):
    """X `[T, I]`, down `[H, I]`, F `[H, H]`, all float64, and float32 gradients that hold F and another sample.

    X has neurons that are nearly linear in others, and a silent one.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, neurons, generator=generator, dtype=torch.float64)
    x[:, 3] = x[:, 4] - x[:, 5] + 0.01 * x[:, 3]
    x[:, 9] = 0
    root = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    down, fisher = torch.randn(hidden, neurons, generator=generator, dtype=torch.float64), root @ root.T
    coupling = 3 * torch.rand(neurons, generator=generator)
    sample = torch.randn(9, neurons, generator=generator), torch.randn(9, hidden, generator=generator)
    return x, down, fisher, LayerGradients(fisher.float(), coupling, *sample)


def explicit_gradients(model, sequence, choose):
    """x `[S, I]` and g `[S, H]` of every layer in float64; g is the gradient with respect to added zeros."""
    model = copy.deepcopy(model).double()
    glus = model_glus(model)
    added = [torch.zeros(len(sequence), glu.hidden_size, dtype=torch.float64, requires_grad=True) for glu in glus]
    inputs = []
    for glu, zeros in zip(glus, added):
        glu.down.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0][0].detach()))
        glu.down.register_forward_hook(lambda module, arguments, output, zeros=zeros: output + zeros)
    logits = model(sequence[None]).logits[0]
    labels = choose(logits.detach().softmax(-1))
    loss = -logits.log_softmax(-1)[torch.arange(len(sequence)), labels].sum()
    return list(zip(inputs, torch.autograd.grad(loss, added)))


def assert_near(found, expected):
    """Equal up to 1e-4 of the largest entry."""
    torch.testing.assert_close(
        found.double() / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)], ids=["fp32", "bf16"])
def test_gradients(family_name, dtype, monkeypatch):
    def choose(p):
        return (p.argmax(-1) * 7 + torch.arange(len(p))) % 64

    model, batches = make_tiny_model(family_name, dtype=dtype, seed=2), random_batches()
    choose_labels(monkeypatch, choose)
    monkeypatch.setattr(sensitivity_module, "_SAMPLE_TOKENS", 13)  # of 54
    found = output_gradients(model, read_batches(model, batches), [0, 2])
    assert list(found) == [0, 2]
    sequences = [sequence for batch in batches for sequence in batch]
    explicit = [explicit_gradients(model, sequence, choose) for sequence in sequences]
    for index, layer in found.items():
        rows = [row[index] for row in explicit]
        x, g = (torch.cat(of) for of in zip(*rows))
        written = g @ model_glus(model)[index].down.weight.detach().double()  # [T, I]
        coupling = (x * written).square().mean(0) / x.square().mean(0) / written.square().mean(0)
        assert layer.fisher.dtype == layer.coupling.dtype == torch.float32
        assert_near(layer.fisher, g.T @ g / len(g))
        torch.testing.assert_close(layer.coupling.double(), coupling, rtol=1e-3, atol=0)
        # A different quarter of the tokens of every row.
        assert_near(layer.x, torch.cat([x[number % 4 :: 4] for number, (x, _) in enumerate(rows)]))
        assert_near(layer.g, torch.cat([g[number % 4 :: 4] for number, (_, g) in enumerate(rows)]))


def test_coupling_of_silent_neurons():
    model = make_tiny_model(seed=1)
    glu = model_glus(model)[1]
    with torch.no_grad():
        glu.weights()[0][5] = 0  # the gate: the neuron is silent
        glu.down.weight[:, 8] = 0  # the neuron's output is zero
    coupling = output_gradients(model, read_batches(model, random_batches()), [1])[1].coupling
    assert coupling[5] == coupling[8] == 1 and coupling.isfinite().all()


def test_activations_are_freed_before_the_next_row(monkeypatch):
    model, losses, compute = make_tiny_model(), [], torch.nn.functional.cross_entropy

    def followed(*arguments, **options):
        loss = compute(*arguments, **options)
        losses.append(weakref.ref(loss))  # it keeps the graph alive, which keeps the activations
        return loss

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", followed)
    alive = []
    model.register_forward_pre_hook(lambda *_: alive.extend(ref for ref in losses if ref() is not None))
    output_gradients(model, read_batches(model, random_batches(((3, 40),))), [1])
    assert len(losses) == 3 and not alive


def test_a_sample_does_not_keep_its_row():
    accumulator = sensitivity_module._Accumulator(torch.nn.Linear(6, 4), step=5)
    accumulator.add(torch.randn(40, 6), torch.randn(40, 4), row=0)
    assert [tensor.untyped_storage().nbytes() for tensor in accumulator._sample[0]] == [8 * 6 * 4, 8 * 4 * 4]


def test_labels_are_drawn_from_the_model():
    """With other labels the Fisher matrix differs; here its expectation is known."""
    model = make_tiny_model(seed=5, initializer_range=0.5)
    token = torch.full((16, 512), 17)
    fisher = output_gradients(model, [(token, None)], [2])[2].fisher
    jacobian = torch.autograd.functional.jacobian(last_logits(model, token[0, 0]), torch.zeros(32, dtype=torch.float64))
    p = last_logits(model, token[0, 0])(torch.zeros(32, dtype=torch.float64)).softmax(-1)
    expected = jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
    torch.testing.assert_close(fisher.double() / expected.norm(), expected / expected.norm(), rtol=0, atol=0.05)


def last_logits(model, token):
    """Logits of a one-token text, as a function of a term added to the last layer's MLP output."""
    model = copy.deepcopy(model).double()

    def logits(added):
        handle = model_glus(model)[2].down.register_forward_hook(lambda module, arguments, output: output + added)
        try:
            return model(token.reshape(1, 1)).logits[0, 0]
        finally:
            handle.remove()

    return logits


@pytest.mark.slow
def test_gradients_predict_the_divergence():
    """In a text that repeats one token, positions are independent, and the mean over the sample is the divergence."""
    model = make_tiny_model(seed=5, initializer_range=0.3)
    text = torch.full((32, 512), 17)
    (layer,) = calibrate(model, [text], sensitivity=True, layers=[2]).layers.values()
    glu = model_glus(model)[2]
    down = glu.down.weight.detach()
    gradients = output_gradients(model, [(text, None)], [2])[2]
    assert len(gradients.x) == len(gradients.g) == 4096
    order = layer.saliency.argsort(descending=True)
    dense = last_logits(model, text[0, 0])(torch.zeros(32)).log_softmax(-1)
    for step in (5, 9):
        kept = order[: 101 - removed_counts(101)[step]].sort().values
        # The full step is too large for a second-order expansion, and a refit to one token leaves almost no error, so
        # the test uses narrowing without a refit, scaled down.
        change = -down.clone()
        change[:, kept] += down[:, kept]
        error = gradients.x @ change.T
        form = (error * gradients.g).sum(1).square().mean().item() / 2
        x = _input_of_down(model, text[:1, :1])
        scale = 1e-3
        pruned = last_logits(model, text[0, 0])(scale * (x @ change.double().T)).log_softmax(-1)
        divergence = (dense.exp() * (dense - pruned)).sum().item() / scale**2
        assert form == pytest.approx(divergence, rel=0.1)


def _input_of_down(model, ids):
    taken = []
    handle = model_glus(model)[2].down.register_forward_pre_hook(lambda module, arguments: taken.append(arguments[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return taken[0][0, 0].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saliency_is_the_minimum_cost_of_a_removal(dtype):
    x, down, fisher, gradients = random_layer(seed=1)
    down, tokens = down.to(dtype), len(x)
    found = saliencies(down, (x.T @ x).float(), gradients, tokens)
    assert found.dtype == torch.float32
    gram = (x.T @ x).float().double()
    gram += sensitivity_module._RIDGE * gram.diagonal().median() * torch.eye(23)
    fisher = fisher + sensitivity_module._DAMPING * fisher.diagonal().mean() * torch.eye(7)
    root, roots = torch.linalg.cholesky(gram), torch.linalg.cholesky(fisher)  # rows of root^T stand for tokens
    for neuron in range(23):
        others = [other for other in range(23) if other != neuron]
        column = root.T[:, [neuron]] @ down[:, [neuron]].double().T  # [I, H], the neuron's output
        rest = root.T[:, others]
        residual = column - rest @ torch.linalg.lstsq(rest, column).solution
        expected = (residual @ roots).square().sum() / (2 * tokens) * (1 + gradients.coupling[neuron]) / 2
        assert found[neuron].item() == pytest.approx(expected.item(), rel=1e-4)


def test_silent_neurons():
    """With few or no active neurons, silent neurons are ranked by what they would add to the output."""
    x, down, fisher, gradients = random_layer()
    damped = fisher + sensitivity_module._DAMPING * fisher.diagonal().mean() * torch.eye(7)
    written = (down * (damped @ down)).sum(0) * (1 + gradients.coupling)
    for active in (0, 3):
        gram = (x.T @ x).float()
        gram[active:], gram[:, active:] = 0, 0
        found = saliencies(down.float(), gram, gradients, 100_000).double()
        assert (found > 0).all()
        torch.testing.assert_close(found[active:] / found[-1], written[active:] / written[-1], rtol=1e-5, atol=0)


def test_gram_matrix_with_nan():
    x, down, _, gradients = random_layer()
    gram = (x.T @ x).float()
    gram[2, 5] = torch.nan
    with pytest.raises(ValueError, match="the Gram matrix has NaN or Inf"):
        saliencies(down.float(), gram, gradients, len(x))
    with pytest.raises(ValueError, match="the Gram matrix has NaN or Inf"):
        narrowing_costs(down.float(), gram, gradients, torch.ones(23))


def test_a_gram_matrix_that_is_indefinite_after_rounding():
    x, down, _, gradients = random_layer(seed=2)
    gram = (x.T @ x).float()
    gram[0, 1] = gram[1, 0] = 2 * (gram[0, 0] * gram[1, 1]).sqrt()
    assert torch.linalg.eigvalsh(gram.double()).min() < -0.1 * gram.diagonal().median()
    found = saliencies(down.float(), gram, gradients, len(x))
    assert found.isfinite().all() and (found > 0).all()


def test_narrowing_costs():
    x, down, _, gradients = random_layer(neurons=64, tokens=200, seed=3)
    gram, saliency = (x.T @ x).float(), torch.rand(64)
    found = narrowing_costs(down.float(), gram, gradients, saliency).double()
    assert found.shape == (16,) and found[0] == 0 and (found[2:] > 0).all()
    sample, g = gradients.x.double(), gradients.g.double()
    assert removed_counts(64) == [0, 0, 1, 2, 4, 6, 9, 12, 16, 20, 25, 30, 36, 42, 49, 56]
    for step, removed in enumerate(removed_counts(64)):
        kept = saliency.topk(64 - removed).indices.sort().values
        ridge = 0.01 * gram.double().diagonal().mean()
        # Least squares with extra rows for the ridge, which shrinks towards the current weights.
        rows = torch.cat([x[:, kept], ridge.sqrt() * torch.eye(len(kept))])
        wanted = torch.cat([x @ down.T, ridge.sqrt() * down[:, kept].T])
        resolved = torch.linalg.lstsq(rows, wanted).solution
        lost = ((sample @ down.T - sample[:, kept] @ resolved) * g).sum(1)
        assert found[step].item() == pytest.approx(lost.square().mean().item() / 2, rel=1e-4, abs=1e-6)


def test_few_rows_of_a_long_text(monkeypatch):
    """Beyond `FISHER_TOKENS` tokens, evenly spaced rows are used, at least one."""
    batches = read_batches(make_tiny_model(), random_batches(((3, 10), (5, 10), (2, 10))))
    rows = [row for ids, _ in batches for row in ids]
    for limit, chosen in ((50, [0, 2, 4, 6, 8]), (100, range(10)), (1, [0])):
        monkeypatch.setattr(sensitivity_module, "FISHER_TOKENS", limit)
        found = sensitivity_module._rows(batches)
        assert all(torch.equal(ids[0], rows[index]) for (ids, _), index in zip(found, chosen, strict=True))


def test_a_single_row_is_not_only_padding(monkeypatch):
    monkeypatch.setattr(sensitivity_module, "FISHER_TOKENS", 1)
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    ((row, _),) = sensitivity_module._rows([(ids, mask)])
    assert torch.equal(row, ids[1:])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_ignored(side, monkeypatch):
    choose_labels(monkeypatch, lambda p: p.argmax(-1))
    model, ids = make_tiny_model(seed=3), random_batches(((1, 9),))[0]
    padded, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.long)  # a row of only padding
    tokens = slice(0, 9) if side == "right" else slice(5, 14)
    padded[0, tokens], mask[0, tokens] = ids[0], 1
    expected = output_gradients(model, read_batches(model, [ids]), [0, 1, 2])
    found = output_gradients(model, read_batches(model, [(padded, mask)]), [0, 1, 2])
    for index in expected:
        for name, tensor in vars(expected[index]).items():
            torch.testing.assert_close(getattr(found[index], name), tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_model_is_unchanged(mode, dtype):
    model = make_tiny_model("gemma2", dtype=dtype, seed=1).train()
    before, state = snapshot(model), torch.get_rng_state()
    with mode():  # tensors created in inference mode behave differently
        mask = torch.ones(2, 8)
        mask[0, 5:] = 0
        calibrate(model, [*random_batches(), (random_batches(((2, 8),))[0], mask)], sensitivity=True)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off():
    model = make_tiny_model(seed=1, attention_dropout=0.5)
    expected = calibrate(model, random_batches(), sensitivity=True)
    found = calibrate(model.train(), random_batches(), sensitivity=True)
    for index, layer in expected.layers.items():
        assert torch.equal(found.layers[index].saliency, layer.saliency)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "fused layers around"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_patched_model(backend, layers):
    model = make_tiny_model(seed=1)
    expected = calibrate(model, random_batches(), sensitivity=True, layers=layers)
    patch(model, backend=backend)
    found = calibrate(model, random_batches(), sensitivity=True, layers=layers)
    for index, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[index].saliency, layer.saliency)
        torch.testing.assert_close(found.layers[index].costs, layer.costs)


def test_nan_in_the_gradients_names_the_layer(unchanged, monkeypatch):
    model = make_tiny_model(seed=1)
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda logits, labels, reduction: logits.sum() * torch.nan
    )
    with unchanged(model), pytest.raises(ValueError, match="layer 0 has NaN or Inf in its gradients"):
        calibrate(model, random_batches(), sensitivity=True)


@pytest.mark.parametrize("spoil", ["head", "last layer"])
def test_nan_in_the_logits(unchanged, spoil):
    model = make_tiny_model(seed=1, tie_word_embeddings=False)
    weight = model.lm_head.weight if spoil == "head" else model_glus(model)[2].down.weight
    weight.data[5, 5] = torch.nan
    with unchanged(model), pytest.raises(ValueError, match="the logits are NaN on the calibration text"):
        calibrate(model, random_batches(), sensitivity=True)


def test_a_decoder_without_a_lm_head(unchanged):
    model = make_tiny_model().model
    with unchanged(model), pytest.raises(ValueError, match="a language-model head, but LlamaModel has none"):
        calibrate(model, random_batches(), sensitivity=True)


def test_calibration_logs_nothing_about_other_weights(caplog):
    with caplog.at_level("INFO"):
        calibrate(make_tiny_model(seed=1), random_batches(((8, 60),)), sensitivity=True)
    assert not caplog.records
