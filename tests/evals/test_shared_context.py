"""Prefix trees give the same log-likelihoods as lm-eval and as one forward pass per request."""

import pytest
import torch
from gluprune_evals import shared_context
from gluprune_evals.harness import model_in_memory
from gluprune_evals.shared_context import SharedContextLM, Tree, can_share, chunks
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.study_cases import save_tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = save_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.5, max_position_embeddings=256)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def requests(seed, count=60):
    """Requests that share prefixes of all lengths; some are equal, some have one-token continuations."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(3, 63, (length,), generator=generator).tolist()

    def pick(below):
        return int(torch.randint(below, (), generator=generator))

    stems = [tokens(length) for length in (1, 7, 33, 70, 120)]
    instances = []
    for _ in range(count):
        context = [*stems[pick(5)], *tokens(pick(4))]
        instances += [(None, context, tokens(1 + pick(3))) for _ in range(1 + pick(4))]
    return [*instances, instances[0], (None, tokens(400), tokens(5)), (None, tokens(1), tokens(256))]


def reference(model, instances, limit):
    answers = []
    double = model.double()
    for _, context, continuation in instances:
        row = (context + continuation)[-(limit + 1) :]
        with torch.no_grad():
            logits = double(torch.tensor([row[:-1]])).logits[0]
        scores = logits.log_softmax(-1)[-len(continuation) :]
        target = torch.tensor(continuation)
        answers.append((scores.gather(1, target[:, None]).sum().item(), bool((scores.argmax(-1) == target).all())))
    model.float()
    return answers


@pytest.mark.parametrize(
    "packed, related", [(40, 90), *[pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((512, 2048), (1, 1))]]
)
@pytest.mark.slow
def test_log_likelihoods(loaded, monkeypatch, packed, related):
    monkeypatch.setattr(shared_context, "PACKED", packed)
    monkeypatch.setattr(shared_context, "RELATED", related)
    model, tokenizer = loaded
    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    # lm-eval's logits cache treats requests as equal if they differ only in where the continuation begins.
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, logits_cache=False)
    instances = requests(seed=packed)
    found = lm._loglikelihood_tokens(instances, disable_tqdm=True)
    others = stock._loglikelihood_tokens(instances, disable_tqdm=True)
    expected = reference(model, instances, lm.max_length)
    for (value, greedy), (other, _), (target, is_greedy) in zip(found, others, expected, strict=True):
        assert value == pytest.approx(target, abs=2e-4, rel=1e-5)
        assert value == pytest.approx(other, abs=2e-4, rel=1e-5)
        assert greedy == is_greedy
    assert len({round(value, 3) for value, _ in found}) > 50


def test_whole_documents(loaded):
    """Perplexities of running text use the same code: windows without a shared prefix."""
    model, tokenizer = loaded
    lm, stock = (kind(pretrained=model, tokenizer=tokenizer, batch_size=2) for kind in (SharedContextLM, HFLM))
    from types import SimpleNamespace

    texts = [" ".join(f"w{n * k % 60}" for n in range(1, length)) for k, length in ((1, 40), (7, 700), (11, 300))]
    instances = [SimpleNamespace(args=(text,)) for text in texts]
    assert lm.loglikelihood_rolling(instances) == pytest.approx(stock.loglikelihood_rolling(instances), rel=1e-5)


def test_tree():
    tree = Tree()
    paths = [list(tree.add(row)) for row in [(5, 6), (5, 6, 7), (5, 8), (9,)]]
    assert tree.tokens == [5, 6, 7, 8, 9] and tree.depths == [0, 1, 2, 1, 0]
    assert paths == [[0, 1], [0, 1, 2], [0, 3], [4]]
    seen = [[i for i, sees in enumerate(row) if sees] for row in tree.visible().tolist()]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 3], [4]]


def test_shared_prefixes_are_computed_once():
    rows = sorted({(1, *range(100), n, n + 1) for n in range(20)})
    sizes = [len(tree.tokens) for tree, _ in chunks(rows)]
    assert sizes == [101 + 2 * 20]


def test_models_that_cannot_share(tiny_model):
    assert can_share(tiny_model("llama")) and not can_share(tiny_model("mistral", sliding_window=8))
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert not can_share(model)


def test_choice_of_class(tmp_path):
    path = save_tiny_model(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert type(model_in_memory(model, tokenizer)) is SharedContextLM
    model.config.sliding_window = 8
    assert type(model_in_memory(model, tokenizer)) is HFLM
