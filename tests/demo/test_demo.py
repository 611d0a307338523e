"""The demonstration from end to end on the real model, with fewer and shorter steps."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from gluprune.demo.run import run


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(run, "PRUNING_RATIOS", (0.2, 0.5))
    monkeypatch.setattr(run, "PROMPT_TOKENS", 16)
    monkeypatch.setattr(run, "NEW_TOKENS", 3)
    monkeypatch.setattr(run, "CALIBRATION_WINDOWS", 4)
    monkeypatch.setattr(run, "CALIBRATION_LENGTH", 128)


def test_demo(short, smollm2_path, tmp_path):
    output = tmp_path / "demo"
    (output / "checkpoint").mkdir(parents=True)
    (output / "checkpoint" / "old.txt").write_text("of an earlier run: replaced")
    record = run.run(str(smollm2_path), output)
    rows = record["rows"]
    assert [(row["recipe"], row["intermediate_size"]) for row in rows] == [
        ("dense", 1536),
        *((recipe.name, width) for recipe in run.RECIPES for width in (1280, 768)),
    ]
    dense, paper, recommended = rows[0], rows[1], rows[5]
    assert dense["parameters"] == 134_515_008 and paper["parameters"] == 134_515_008 - 30 * 3 * 576 * 256
    assert paper["bytes"] == 2 * paper["parameters"]
    assert dense["perplexity"] < recommended["perplexity"] < paper["perplexity"]
    assert all(row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0 for row in rows)
    assert json.loads((output / "demo.json").read_text()) == record
    table = (output / "demo.md").read_text()
    assert table.count("\n| ") == 1 + len(rows) and "torch" not in record["hardware"]
    assert (output / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    saved = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    assert not (output / "checkpoint" / "old.txt").exists()
    assert saved.config.intermediate_size == 1280 and saved.dtype == torch.bfloat16
    text = run.summary(record, output)
    assert "recommended" in text and str(output / "demo.png") in text


def test_a_checkpoint_that_does_not_reload_equal_is_told(smollm2, smollm2_tokenizer, tmp_path, monkeypatch):
    def spoiled(model, path, tokenizer):
        model.save_pretrained(path)
        model.model.norm.weight.data.mul_(2)

    monkeypatch.setattr(run, "save", spoiled)
    with pytest.raises(RuntimeError, match="does not give the logits of the model that was saved"):
        run._save_and_reload(smollm2, smollm2_tokenizer, torch.arange(40), tmp_path / "out")
