"""The public functions: listed, imported on first use, documented with examples that run."""

import doctest
import inspect
import subprocess
import sys
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gluprune

EXPECTED = {
    *("prune", "reconstruct", "calibrate", "Statistics", "Recipe", "batches_from_text", "sample_text", "info"),
    *("prune_checkpoint", "load", "save", "patch", "patch_llama", "unpatch", "unpatch_llama", "fusion_status"),
    "wikipedia_text",
    *("PruneReport", "graph_decoding", "export", "perplexity", "shrink", "push_to_hub", "heal"),
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A random Llama with 2 layers of 512 neurons, and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = ["<unk>", "<s>", "</s>", "A", "long", "text", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


def test_all_lists_the_public_names():
    assert set(gluprune.__all__) == EXPECTED
    assert list(gluprune.__all__) == sorted(gluprune.__all__)
    assert set(gluprune.__all__) <= set(dir(gluprune))
    for name in gluprune.__all__:
        assert getattr(gluprune, name).__name__ in (name, name.removesuffix("_llama"))
    with pytest.raises(AttributeError, match="module 'gluprune' has no attribute 'purne'"):
        getattr(gluprune, "purne")  # noqa: B009


def test_importing_the_package_imports_no_framework():
    code = "import sys, gluprune; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(EXPECTED - {"PruneReport"}))
def test_examples_of_the_docstrings_run(name, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", MagicMock())
    member = getattr(gluprune, name)
    assert ">>>" in inspect.getdoc(member), f"{name} has no example"
    names = {"model_path": model_path, "folder": tmp_path}
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in finder.find(member, name, globs=names):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries > 0


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_docstrings_name_every_argument(name):
    member = getattr(gluprune, name)
    text = inspect.getdoc(member)
    named = inspect.signature(member).parameters
    for argument in named:
        assert f"{argument}: " in text, f"{name} does not describe {argument}"
    annotations = {p.annotation for p in named.values()}
    assert inspect.Parameter.empty not in annotations - {
        p.annotation for p in named.values() if p.kind is inspect.Parameter.VAR_KEYWORD
    }, f"{name} has an argument without a type"


def test_the_default_score_uses_all_three_projections():
    for function in (gluprune.prune, gluprune.prune_checkpoint, gluprune.Recipe):
        assert inspect.signature(function).parameters["score"].default == "maw_gud"
