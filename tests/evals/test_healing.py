"""The command that measures healed models: what it trains on, the records, the table, resuming."""

import dataclasses

import pytest
from gluprune_evals import healing, quality
from transformers import AutoTokenizer

from gluprune.calibration.batches import batches_from_text
from gluprune.checkpoints.load_save import load
from gluprune.healing.training import train
from gluprune.measure.records import read
from tests.evals.test_quality import command  # noqa: F401 (a fixture)


@pytest.mark.slow
def test_records_and_table(command, tmp_path, monkeypatch, capsys):  # noqa: F811
    pruned = next(iter(healing.METHODS))
    healed = f"{pruned}, healed"
    method = quality.Method.parse("surgeon+compensate+reconstruct", 6, text="both", reconstruction=3)
    monkeypatch.setattr(quality, "METHODS", {pruned: method})
    windows = []

    def recorded(student, teacher, given, **options):
        windows.append(given)
        return train(student, teacher, given, **options)

    monkeypatch.setattr(healing, "train", recorded)
    prune, built = quality._prune, []
    monkeypatch.setattr(quality, "_prune", lambda *given: built.append(given) or prune(*given))
    command += [f"--method={pruned}", "--ratios", "0.4", "--tokens", "64", "--batch", "2", "--learning-rate", "3e-3"]
    folder = tmp_path / "models"
    command.insert(0, f"--checkpoints={folder}")
    assert healing.main(command) == 0 and len(windows) == 1
    assert [len(each) for each in windows] == [8]  # four of each text
    records = read(tmp_path / "out" / "healing.jsonl")
    found = {(r.provider, r.shape["text"]): r.p50 for r in records if r.what == "perplexity"}
    assert set(found) == {(p, t) for p in ("dense", pruned, healed) for t in ("one", "two")}
    table = (tmp_path / "out" / "healing.md").read_text()
    cells = [
        " · ".join(f"{found[provider, text] / found['dense', text]:.2f}" for text in ("one", "two"))
        for provider in (pruned, healed)
    ]
    assert f"| {pruned} | 40% | {cells[0]} | {cells[1]} | 64 | all | 0.003 |" in table
    assert table in capsys.readouterr().out
    assert healing.main(command) == 0 and len(windows) == 1  # nothing is measured twice
    assert (tmp_path / "out" / "healing.md").read_text() == table
    others = [
        dataclasses.replace(r, p50=2 * r.p50, shape=r.shape | {"calibration_digest": "another"})
        for r in records
        if r.provider == pruned
    ]
    assert healing.table([*records, *others]) == table, "a row has the pruned model of its own calibration"
    saved = sorted(folder.iterdir(), key=lambda path: "healed" in path.name)
    for path, provider in zip(saved, (pruned, healed), strict=True):
        assert path.name.startswith("uniform-16-0.4-")
        model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
        for text in ("one", "two"):
            held_out = batches_from_text(tokenizer, (tmp_path / f"{text}.txt").read_text(), 3, 9, batch_size=1)
            assert quality.windows_perplexity(model, held_out) == pytest.approx(found[provider, text], rel=1e-5)
    assert healing.main([*command[:-1], "1e-3"]) == 0 and len(windows) == 2
    assert len(list(folder.iterdir())) == 3 and len(built) == 1, "another training starts from the saved pruned model"
    assert healing.main([*command[:-2], "--text=one"]) == 2
