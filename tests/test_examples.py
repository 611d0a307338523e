"""The examples run as a user runs them, on the small real model, each in a separate folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, folder, *arguments):
    """Run an example; returns its standard output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_has_a_test():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"prune_and_save.py", "best_recipe.py", "evaluate_and_compare.py"}


@pytest.mark.slow
def test_prune_and_save(tmp_path, smollm2_path):
    printed = run("prune_and_save.py", tmp_path)
    assert "1536 -> 1408 neurons" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.intermediate_size == 1408


@pytest.mark.slow
def test_best_recipe(tmp_path, smollm2_path):
    printed = run("best_recipe.py", tmp_path)
    assert "score surgeon" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").config.intermediate_size == 1280


@pytest.mark.slow
def test_evaluate_and_compare(tmp_path, smollm2_path):
    rows = [line.split() for line in run("evaluate_and_compare.py", tmp_path).splitlines()]
    dense, maw, maw_gud, hybrid = (float(row[1]) for row in rows)
    assert dense < hybrid < maw_gud < maw
