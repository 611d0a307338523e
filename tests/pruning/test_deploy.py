"""`deploy=`: widths that fit the program that will run the model."""

import json

import pytest
import torch

import gluprune
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.cli import main
from gluprune.pruning.recipe import Recipe
from tests.helpers.tiny_models import assert_unchanged, make_tiny_model, snapshot


@pytest.mark.parametrize(
    "options, multiple",
    [
        ({}, 128),
        ({"deploy": "vllm"}, 128),
        ({"deploy": "vllm", "multiple_of": 1}, 8),
        ({"deploy": "llama.cpp"}, 256),
        ({"deploy": "tp8", "multiple_of": 1}, 64),
        ({"deploy": "tp8", "multiple_of": 48}, 192),
        ({"deploy": "vllm", "multiple_of": 1, "allocation": "sensitivity"}, 8),
        ({"deploy": "llama.cpp", "multiple_of": 512, "allocation": "sensitivity"}, 512),
    ],
)
def test_widths_fit_both_the_multiple_and_the_program(options, multiple):
    assert Recipe(**options).width_multiple == multiple


def test_an_unknown_program_is_rejected():
    with pytest.raises(ValueError, match=r"unknown deploy 'ollama'; allowed: transformers, vllm, .*llama\.cpp"):
        Recipe(deploy="ollama")


def test_the_report_says_which_width_was_taken_and_for_what(tmp_path, capsys):
    """In memory, on disk and on the command line."""
    model = make_tiny_model(intermediate_size=700)
    model.save_pretrained(tmp_path / "dense")
    report = gluprune.prune(model, pruning_ratio=0.4, deploy="llama.cpp")
    assert (report.intermediate_size, report.multiple_of, report.deploy) == (512, 256, "llama.cpp")
    assert str(report).endswith("; multiples of 256 for llama.cpp")
    on_disk = prune_checkpoint(tmp_path / "dense", tmp_path / "out", pruning_ratio=0.4, deploy="llama.cpp")
    assert {**on_disk.to_dict(), **report.to_dict()} == on_disk.to_dict()
    assert gluprune.info(tmp_path / "out").history.steps[0]["deploy"] == "llama.cpp"
    arguments = ["prune", str(tmp_path / "dense"), "--out", str(tmp_path / "cli"), "--pruning-ratio", "0.4"]
    assert main([*arguments, "--deploy", "llama.cpp"]) == 0
    assert "700 -> 512 neurons" in (printed := capsys.readouterr().out) and "multiples of 256 for llama.cpp" in printed


@pytest.mark.parametrize(
    "family, deploy, reason",
    [
        ("llama", "tp4", "101 is not a multiple of 4"),
        ("qwen3", "vllm", "the format for such layers does not hold qwen3"),
    ],
)
def test_layers_that_the_program_would_refuse(family, deploy, reason, tmp_path):
    """Layers that are not pruned keep their width; nothing is changed."""
    model = make_tiny_model(family, dtype=torch.float32)
    model.save_pretrained(tmp_path / "dense")
    before = snapshot(model)
    options = {"intermediate_size": 64, "multiple_of": 1, "layers": [1], "deploy": deploy}
    if deploy == "llama.cpp":
        model = make_tiny_model(family, intermediate_size=513)
        model.save_pretrained(tmp_path / "dense")
        before, reason = snapshot(model), reason.replace("101", "513")
        options["intermediate_size"] = 256
    with pytest.raises(ValueError, match=f"deploy='{deploy}' refuses the result: .*{reason}"):
        gluprune.prune(model, **options)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=reason):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_written_out", [True, False])
@pytest.mark.parametrize(
    "deploy, reason",
    [
        ("awq", "the hidden size 32 is not a multiple of 128"),
        ("gptq", "the hidden size 32 is not a multiple of 128"),
        ("tp8", "4 attention heads do not divide among 8 ranks"),
    ],
)
def test_sizes_that_no_width_makes_up_for(deploy, reason, is_written_out, tmp_path, capsys):
    """`prune` and `shrink` refuse for the reason that `info` gives; before any text is read, also for defaults."""
    model = make_tiny_model(intermediate_size=512)
    model.save_pretrained(tmp_path / "dense")
    if not is_written_out:  # then transformers fills in what the JSON leaves to it
        file = tmp_path / "dense" / "config.json"
        entries = json.loads(file.read_text())
        del entries["tie_word_embeddings"]
        file.write_text(json.dumps(entries))
    assert str(gluprune.info(tmp_path / "dense").consumers[deploy]) == f"refused: {reason}"
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"deploy='{deploy}' refuses the result: {reason}"):
        gluprune.prune(model, pruning_ratio=0.4, deploy=deploy)
    assert_unchanged(model, before)
    (text := tmp_path / "text.txt").write_text("a few words")
    paths = [str(tmp_path / "dense"), "--out", str(tmp_path / "out"), "--deploy", deploy]
    for command in (["prune", *paths, "--pruning-ratio=0.4"], ["shrink", *paths, "--ratio=0.4", "--text", str(text)]):
        assert main(command) == 2
        assert f"--deploy {deploy} refuses the result: {reason}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
