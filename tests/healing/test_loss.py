"""The loss of healing against double loops over tokens and vocabulary, in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from gluprune.healing.loss import chunk_tokens, divergence, hidden_error
from gluprune.healing.student import answer, decoded
from tests.helpers.tiny_models import make_tiny_model, token_ids

# Models whose logits are scaled or capped would hide it at logits near 0.
OPTIONS = {"granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 0.7}}


def models(family, **options):
    """A student and a teacher that differ, with logits of order one."""
    settings = {"initializer_range": 0.3, "attn_implementation": "eager", **OPTIONS.get(family, {}), **options}
    return make_tiny_model(family, seed=1, **settings), make_tiny_model(family, seed=2, **settings)


def looped(student, teacher, ids):
    """The divergence, token by token and entry by entry."""
    with torch.no_grad():
        q, p = (model(ids).logits.double().flatten(0, 1).tolist() for model in (student, teacher))
    total = 0.0
    for found, expected in zip(q, p, strict=True):
        log_q, log_p = (math.log(math.fsum(map(math.exp, row))) for row in (found, expected))
        total += sum(math.exp(b - log_p) * ((b - log_p) - (a - log_q)) for a, b in zip(found, expected, strict=True))
    return total / len(q)


def computed(student, teacher, ids, chunk=None):
    return divergence(
        student, decoded(student, ids, False).last_hidden_state, answer(teacher, ids, False).logits, chunk=chunk
    )


def test_divergence_of_each_family(family_name):
    student, teacher = models(family_name)
    ids = token_ids(2, 7)
    expected = looped(student, teacher, ids)
    assert expected > 1e-3
    for chunk in (1, 5, 14, None):
        assert computed(student, teacher, ids, chunk).item() == pytest.approx(expected, rel=2e-5), chunk
    assert computed(student, student, ids).item() == pytest.approx(0, abs=1e-6)


def test_it_is_the_forward_divergence():
    """KL(teacher || student) is not KL(student || teacher)."""
    student, teacher = models("llama")
    ids = token_ids(2, 7)
    assert computed(student, teacher, ids).item() != pytest.approx(looped(teacher, student, ids), rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients(family, tied):
    """Of all weights, against autograd through the model's own logits of all tokens at once, in float64."""
    student, teacher = models(family, tie_word_embeddings=tied)
    ids = token_ids(2, 7)
    (3 * computed(student, teacher, ids, 5)).backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    exact, target = student.double(), teacher.double()
    exact.zero_grad()
    with torch.no_grad():
        p = target(ids).logits.log_softmax(-1)
    q = exact(ids).logits.log_softmax(-1)
    (3 * (p.exp() * (p - q)).sum(-1).mean()).backward()
    for name, parameter in exact.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0 and (found[name] - parameter.grad).abs().max() <= 2e-4 * scale, name


def test_a_frozen_head_gets_no_gradient():
    student, teacher = models("llama", tie_word_embeddings=False)
    student.lm_head.weight.requires_grad_(False)
    computed(student, teacher, token_ids(2, 7)).backward()
    assert student.lm_head.weight.grad is None and student.model.norm.weight.grad.abs().max() > 0
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    assert not computed(student, teacher, token_ids(2, 7)).requires_grad


def test_logits_of_few_tokens_exist_at_a_time(monkeypatch):
    """For a vocabulary of 128k tokens, 128 MiB of logits in float32."""
    from gluprune.healing import loss

    assert chunk_tokens(128_256) == 261
    sizes, real = [], loss.head_logits
    monkeypatch.setattr(loss, "head_logits", lambda m, h, p: sizes.append(len(h)) or real(m, h, p))
    student, teacher = models("llama")
    computed(student, teacher, token_ids(2, 7), 4)
    assert sizes == [4, 4, 4, 2]


def test_hidden_error():
    """Against a loop; a zero state does not divide by zero, and a large one counts as much as the others."""
    generator = torch.Generator().manual_seed(0)
    h, t = (torch.randn(3, 2, 5, 8, generator=generator) for _ in range(2))
    t[0, 1, 2] *= 1000
    found = hidden_error(list(h), list(t))
    values = []
    for layer in range(3):
        for row in range(2):
            for token in range(5):
                a, b = h[layer, row, token].double(), t[layer, row, token].double()
                values.append(float(((a - b) ** 2).sum() / (b**2).sum()))
    assert found.item() == pytest.approx(math.fsum(values) / len(values), rel=1e-5)
    assert hidden_error(list(t), list(t)).item() == 0
    assert hidden_error([torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 4)]).item() == 0


def test_the_answer_of_a_teacher():
    """Logits and hidden states are those of its own forward, without gradients."""
    _, teacher = models("llama")
    ids = token_ids(2, 7)
    found = answer(teacher, ids, True)
    own = teacher(ids, output_hidden_states=True)
    assert torch.allclose(found.logits(slice(3, 9)), own.logits.flatten(0, 1)[3:9], atol=1e-6)
    assert len(found.hidden_states) == 3
    for layer, expected in zip(found.hidden_states, own.hidden_states[1:], strict=True):
        assert torch.equal(layer, expected) and not layer.requires_grad
    assert F.mse_loss(found.hidden_states[0], found.hidden_states[1]) > 0
