"""The command that writes the quality table: reading text, resuming after an interruption, the table."""

import itertools
import math

import pytest
import torch
from gluprune_evals import quality
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gluprune.measure.records import read
from gluprune.pruning.reconstruct import reconstruct
from tests.helpers.tiny_models import make_tiny_model

WORDS = [f"w{number:02}" for number in range(60)]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Arguments of a run on a tiny model with six methods and short windows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quality, "WINDOW", 8)
    monkeypatch.setattr(quality, "OWN_WINDOWS", 5)
    methods = {
        "MAW": quality.Method.parse("maw"),
        "hybrid": quality.Method.parse("hybrid+compensate", 6),
        "own": quality.Method.parse("hybrid+compensate", 6, text="both"),
        "own only": quality.Method.parse("hybrid+compensate", 6, text="own"),
        "by layer": quality.Method.parse("surgeon+sensitivity", 6, text="both"),
        "reconstructed": quality.Method.parse("hybrid+compensate+reconstruct", 6, reconstruction=3),
    }
    monkeypatch.setattr(quality, "METHODS", methods)
    make_tiny_model(seed=1).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({word: number + 3 for number, word in enumerate(WORDS)}, unk_token="w00"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w59").save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    for name in ("calibration.txt", "one.txt", "two.txt"):
        words = [WORDS[i] for i in torch.randint(0, 60, (80,), generator=generator)]
        (tmp_path / name).write_text(" ".join(words))
    texts = [f"--text={name}={tmp_path / name}.txt" for name in ("one", "two")]
    fixed = ["--calibration", f"{tmp_path / 'calibration.txt'}", "--model", f"{tmp_path / 'model'}", "--windows", "3"]
    return [*fixed, *texts, "--out", f"{tmp_path / 'out'}"]


@pytest.mark.slow
def test_every_row_once(command, tmp_path, monkeypatch, capsys):
    """An interrupted and resumed run gives the records of an uninterrupted one, and nothing is measured twice."""
    out, measured, reconstructed = tmp_path / "out", [], []
    perplexity = quality.windows_perplexity

    def stops(*arguments):
        measured.append(perplexity(*arguments))
        if len(measured) == 9:
            raise KeyboardInterrupt
        return measured[-1]

    def follow(pruned, dense, batches):
        widths = (model.config.intermediate_size for model in (pruned, dense))
        reconstructed.append((*widths, sum(map(len, batches))))
        reconstruct(pruned, dense, batches)

    monkeypatch.setattr(quality, "windows_perplexity", stops)
    monkeypatch.setattr(quality, "reconstruct", follow)
    with pytest.raises(KeyboardInterrupt):
        quality.main(command)
    assert quality.main(command) == 0
    assert len(measured) == 2 * (1 + 6 * 4) + 1
    records = read(out / "quality.jsonl")
    found = [(r.provider, r.shape["ratio"], r.shape["text"]) for r in records if r.what == "perplexity"]
    methods = [("dense", 0.0), *itertools.product(quality.METHODS, (0.1, 0.2, 0.4, 0.6))]
    assert sorted(found) == sorted((*row, text) for row in methods for text in ("one", "two"))
    table = (out / "quality.md").read_text()
    assert table in capsys.readouterr().out
    for record in records:
        if record.what == "perplexity":
            assert f"{record.p50:.1f} (" in table or record.provider == "dense"
    assert (out / "quality.png").stat().st_size > 10_000
    calibrations = [r.shape for r in records if r.what == "calibrate"]
    assert len(calibrations) == 4, "calibration was repeated when a later method used the same text"
    assert len({shape["calibration_digest"] for shape in calibrations}) == 3, "own text differs between calibrations"
    (own,) = (tmp_path / "cache" / "gluprune").glob("*-own.txt")
    windows = 6 + len(own.read_text().split()) // quality.WINDOW
    assert windows > 6
    assert {(shape["calibration_windows"], shape.get("sensitivity", False)) for shape in calibrations} == {
        *((6, False), (windows, False), (windows - 6, False), (windows, True))
    }
    with_windows = {
        r.provider: r.shape["reconstruction_windows"] for r in records if "reconstruction_windows" in r.shape
    }
    assert with_windows == {"reconstructed": 3}
    assert reconstructed == [(width, 101, 3) for width in (91, 81, 61, 41)]
    assert f"for {windows} windows, sensitivities included" in table
    assert f"| own | {windows} |" in table and f"| own only | {windows - 6} |" in table
    assert "| hybrid | 6 |" in table and "| MAW | none |" in table
    assert "| reconstructed | 6 + 3 |" in table
    assert quality.main(command) == 0 and len(measured) == 51
    assert (out / "quality.md").read_text() == table
    (tmp_path / "two.txt").write_text(" ".join(reversed(WORDS * 2)))  # a different text is measured again
    assert quality.main(command) == 0 and len(measured) == 51 + 25


def test_chosen_methods_and_ratios(command, tmp_path):
    assert quality.main([*command, "--method", "MAW", "--method", "hybrid", "--ratios", "0.5", "0.25"]) == 0
    rows = {(r.provider, r.shape["ratio"]) for r in read(tmp_path / "out/quality.jsonl") if r.what == "perplexity"}
    assert rows == {("dense", 0.0), *itertools.product(("MAW", "hybrid"), (0.5, 0.25))}
    table = (tmp_path / "out/quality.md").read_text()
    assert "| method | windows | 25% | 50% | seconds |" in table and "at all 2 ratios" in table


def test_methods_without_data_need_no_calibration_text(command, tmp_path):
    (tmp_path / "calibration.txt").write_text("w01 w02")
    assert quality.main([*command, "--method", "MAW", "--ratios", "0.5"]) == 0
    assert not (tmp_path / "cache").exists(), "the model wrote text"
    assert "Calibration" not in (tmp_path / "out/quality.md").read_text()


def test_perplexity_of_windows():
    model = make_tiny_model(seed=2)
    windows = list(torch.randint(3, 64, (3, 1, quality.WINDOW + 1), generator=torch.Generator().manual_seed(3)))
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(window).logits[0, :-1].double()
        losses.append(-logits.log_softmax(-1).gather(1, window[0, 1:, None]).mean())
    expected = math.exp(sum(losses) / 3)
    assert quality.windows_perplexity(model, windows) == pytest.approx(expected, rel=1e-5)


def test_bad_input(command, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n{"label": 3}')
    assert quality.main([*command, "--text", f"other={tmp_path / 'other.jsonl'}"]) == 2
    assert "line 2 has none of the fields text, page, question, answer" in capsys.readouterr().err
    assert quality.main([*command, "--text", "absent=nowhere.txt"]) == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert quality.main([*command, "--windows", "0"]) == 2
    assert "windows must be at least 1" in capsys.readouterr().err
    (tmp_path / "calibration.txt").write_text("w01 w02")
    assert quality.main(command) == 2
    assert not (tmp_path / "cache").exists(), "the error must come before text is generated"
    assert "the text has 2 tokens" in capsys.readouterr().err
