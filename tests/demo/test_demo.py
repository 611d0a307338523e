"""The demonstration end to end on the real model, with fewer and shorter steps."""

import json
import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM

from gluprune.cli import main
from gluprune.cli.command import Command
from gluprune.demo import run, table, timing

SHORT = run.Settings(
    ratios=(0.2, 0.5),
    calibration_windows=4,
    reconstruction_windows=2,
    window=128,
    prompt_tokens=16,
    new_tokens=3,
    rounds=2,
    sample_tokens=3,
)


@pytest.mark.slow
def test_demo(smollm2_path, tmp_path, monkeypatch):
    output = tmp_path / "demo"
    (output / "checkpoint").mkdir(parents=True)
    (output / "checkpoint" / "old.txt").write_text("of an earlier run: replaced")
    record = run.run(str(smollm2_path), output, SHORT)
    rows = record["rows"]
    assert [(row["recipe"], row["intermediate_size"]) for row in rows] == [
        ("dense", 1536),
        *((recipe, width) for recipe in run.RECIPES for width in (1280, 768)),
    ]
    dense, paper, recommended = rows[0], rows[1], rows[5]
    assert dense["parameters"] == 134_515_008 and paper["parameters"] == 134_515_008 - 30 * 3 * 576 * 256
    assert paper["bytes"] == 2 * paper["parameters"]
    assert dense["perplexity"] < recommended["perplexity"] < rows[3]["perplexity"] < paper["perplexity"]
    assert all(row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0 for row in rows)
    speeds = {(row["intermediate_size"], row["decode_tokens_per_second"]) for row in rows}
    assert len(speeds) == 3, "the speed depends only on the width, not on the recipe"
    assert json.loads((output / "demo.json").read_text()) == record
    markdown = (output / "demo.md").read_text()
    assert markdown.count("\n| ") == 1 + len(rows) and "torch" not in record["hardware"]
    assert (output / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    saved = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    assert not (output / "checkpoint" / "old.txt").exists()
    assert saved.config.intermediate_size == 1280 and saved.dtype == torch.bfloat16
    text = table.summary(record)
    assert run.RECOMMENDED in text and str(output / "demo.png") in text
    assert text.splitlines()[-3:] == [f"  {command}" for command in table.next_steps(record)]
    ran = []
    monkeypatch.setattr(Command, "invoke", lambda self, ctx: ran.append((self.name, ctx.params)))
    (output / "pruned").mkdir()  # which the second command would write
    for command in table.next_steps(record):
        assert main(shlex.split(command)[1:]) == 0
    assert [name for name, _ in ran] == ["calibrate", "prune", "reconstruct"]
    assert (ran[0][1]["model"], ran[0][1]["text"]) == (str(smollm2_path), [str(output / "calibration.txt")])
    assert (output / "calibration.txt").read_text() == run.calibration_text()


def test_models_are_timed_in_turns_and_the_fastest_run_counts(monkeypatch, tiny_model):
    """Two models, three rounds in the order a b a b a b; the shortest times count."""
    order = []

    def timed(generator, prompts, new_tokens):
        order.append(generator.model)
        slow = {0: 1.0, 1: 3.0, 2: 2.0}[(len(order) - 1) // 2]
        return type("Timing", (), {"ttft": 0.5 * slow, "tpot": 0.1 * slow * len(order)})

    monkeypatch.setattr(timing, "time_generator", timed)
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    speeds = timing.time_in_turns({101: first, 64: second}, torch.ones(1, 8, dtype=torch.long), 3, 3)
    assert order == [first, second] * 3
    assert speeds[101] == timing.Speed(8 / 0.5, pytest.approx(1 / 0.1))
    assert speeds[64] == timing.Speed(8 / 0.5, pytest.approx(1 / 0.2))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_reload_equal_is_an_error(smollm2, smollm2_tokenizer, tmp_path, monkeypatch):
    def spoiled(model, path, tokenizer):
        model.save_pretrained(path)
        model.model.norm.weight.data.mul_(2)

    monkeypatch.setattr(run, "save", spoiled)
    with pytest.raises(RuntimeError, match="does not give the logits of the model that was saved"):
        run._save_and_reload(smollm2, smollm2_tokenizer, torch.arange(40), tmp_path / "out")
