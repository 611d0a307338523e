"""README and docs: length, code blocks that run as printed, links that resolve, figures that are on record."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gluprune.measure.records import read
from tests.helpers.markdown import (
    blocks,
    broken_links,
    commands,
    markdown_files,
    relative,
    run_block,
    run_gluprune,
    table,
)
from tests.helpers.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES_THAT_RUN = [ROOT / "docs" / name for name in ("quickstart.md",)]


def save_tiny_llama(folder):
    """Save a random Llama with two layers, and a byte-level tokenizer with a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([README.read_text(encoding="utf-8")], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>"
    )
    model = make_tiny_model(
        "llama", seed=0, intermediate_size=320, vocab_size=len(fast), max_position_embeddings=2048, num_hidden_layers=2
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


@pytest.fixture
def one_thread():
    """Use one thread: small matrices gain nothing from more, and on a busy machine they become much slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder_with_llama(tmp_path, monkeypatch, one_thread):
    """A working directory in which README's Hub id is a local folder, which transformers prefers to the Hub."""
    (tmp_path / HUB_ID).parent.mkdir()
    save_tiny_llama(tmp_path / HUB_ID)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_is_short():
    """README is one page; everything else is in docs."""
    assert README.stat().st_size <= 6000


def check_checkpoints(folder, *names):
    for name in names:
        narrow = AutoModelForCausalLM.from_pretrained(name)
        assert narrow.config.intermediate_size == 256
        assert (folder / name / "tokenizer.json").is_file()


@pytest.mark.slow
def test_readme_runs_as_printed(folder_with_llama):
    """The blocks of README in order, in one folder and one Python process."""
    variables = {}
    found = blocks(README)
    assert {block.language for block in found} == {"python", "sh"}
    for block in found:
        run_block(block, README, variables)
    dense = AutoModelForCausalLM.from_pretrained(HUB_ID)
    check_checkpoints(folder_with_llama, "narrow-py", "narrow")
    # Embeddings are never changed.
    assert torch.equal(variables["model"].get_input_embeddings().weight, dense.get_input_embeddings().weight)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.stem)
def test_pages_run_as_printed(page, folder_with_llama):
    """Python and shell blocks of the pages that are meant to run from top to bottom."""
    variables = {}
    for block in blocks(page):
        run_block(block, page, variables)
    check_checkpoints(folder_with_llama, "narrow-py", "pruned", "narrow", "shrunk")


def test_install_lines_name_extras_that_exist():
    """The extras in `pip install '.[name]'` of README and docs are defined."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    lines = [
        arguments
        for path in markdown_files(ROOT)
        for block in blocks(path)
        if block.language == "sh"
        for arguments in commands(block)
    ]
    installed = [argument for arguments in lines if arguments[0] == "pip" for argument in arguments[2:]]
    named = {name for argument in installed for name in re.findall(r"\[([\w,-]+)\]", argument)}
    assert named
    assert {part for name in named for part in name.split(",")} <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


def help_of(capsys, *command):
    """The output of `gluprune COMMAND --help`."""
    assert run_gluprune([*command, "--help"]) == 0
    return capsys.readouterr().out


def test_commands_of_the_readme_are_those_of_the_program(capsys, monkeypatch):
    """README's table of commands is complete."""
    monkeypatch.setenv("COLUMNS", "120")
    listed = re.findall(r"^│ (\w+) ", help_of(capsys), re.MULTILINE)
    rows = table(README.read_text(encoding="utf-8"), "## Commands")
    assert {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)} == set(listed)


def test_options_in_the_pages_exist(capsys, monkeypatch):
    """Every option used in a gluprune command line of README and docs is in the help of that command."""
    monkeypatch.setenv("COLUMNS", "200")
    used = {}
    for path in markdown_files(ROOT):
        for block in blocks(path):
            for name, *arguments in commands(block) if block.language == "sh" else []:
                if name == "gluprune":
                    used.setdefault(arguments[0], set()).update(a for a in arguments if a.startswith("--"))
    assert len(used) >= 9
    for command, options in used.items():
        known = set(re.findall(r"--[a-z-]+", help_of(capsys, command)))
        assert options <= known, command


@pytest.mark.parametrize("path", markdown_files(ROOT), ids=lambda path: relative(path, ROOT))
def test_links_resolve(path):
    """The files and headings that README and docs link to exist."""
    assert broken_links(path, ROOT) == []


def test_quality_figures_of_the_readme_are_on_record():
    """Each cell of README's quality table is the quotient of two committed records, rounded."""
    providers = (
        "MAW",
        "MAW gate+up+down",
        "hybrid, re-solved, + own text",
        "surgeon, reconstructed on more, + own text",
    )
    records = read(ROOT / "evals/results/default-text/quality.jsonl")
    perplexity = {
        (record.provider, record.shape["text"], record.shape["ratio"]): record.p50
        for record in records
        if record.what == "perplexity"
    }
    rows = table(README.read_text(encoding="utf-8"), "## Quality")[: len(providers)]
    for provider, (_, *cells) in zip(providers, rows, strict=True):
        for ratio, cell in zip((0.1, 0.2, 0.4, 0.6), cells, strict=True):
            for text, printed in zip(("wikitext2", "lambada"), cell.split(" · "), strict=True):
                value = perplexity[provider, text, ratio] / perplexity["dense", text, 0.0]
                decimals = len(printed.partition(".")[2])
                assert f"{value:.{decimals}f}" == printed, (provider, text, ratio)
    by_layer = "surgeon by layer, reconstructed on more, + own text"
    dense = perplexity["dense", "wikitext2", 0.0]
    values = ", ".join(f"{perplexity[by_layer, 'wikitext2', ratio] / dense:.2f}" for ratio in (0.1, 0.2, 0.4, 0.6))
    assert f"Widths by layer do better ({values} on WikiText-2)" in README.read_text(encoding="utf-8")


def test_speed_figures_of_the_readme_are_on_record():
    """Each cell of README's speed table is a committed record in milliseconds, rounded."""
    gpu = read(ROOT / "benchmarks/results/nvidia-h200/model.jsonl")
    cpu = read(ROOT / "benchmarks/results/amd-epyc/model.jsonl")

    def tokens(records, provider, **shape):
        wanted = shape.items()
        found = [r for r in records if r.what == "generation: TPOT" and r.provider == provider]
        return {r.shape["I"]: r.p50 for r in found if wanted <= r.shape.items()}

    rows = [
        tokens(gpu, "transformers", decoding="graph", batch=8),
        tokens(gpu, "gluprune", decoding="graph", batch=8),
        tokens(cpu, "transformers"),
    ]
    widths = [(8192, 6554, 4916, 4096, 3277)] * 2 + [(1536, 1229, 922, 768, 615)]
    printed = table(README.read_text(encoding="utf-8"), "## Speed")[: len(rows)]
    for values, sizes, (_, *cells) in zip(rows, widths, printed, strict=True):
        for size, cell in zip(sizes, cells, strict=True):
            decimals = len(cell.partition(".")[2])
            assert f"{values[size] * 1000:.{decimals}f}" == cell, size
