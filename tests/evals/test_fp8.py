"""The command that measures fp8 weights: nothing on record is measured again, and the table compares."""

from gluprune_evals import fp8, quality
from transformers import AutoTokenizer

from gluprune.measure.records import read
from gluprune.runtime.rounding import dequantize, quantize
from tests.evals.test_quality import command  # noqa: F401
from tests.helpers.tiny_models import make_tiny_model


def test_the_rounded_model_is_compared(command, tmp_path, monkeypatch, capsys):  # noqa: F811
    measured = []

    def noted(model, windows):
        layer = model.model.layers[1].mlp
        down = layer.state_dict()["down_proj.weight"]
        measured.append(bool((dequantize(*quantize(down)) == down).all()))
        return 50.0 + 0.25 * len(measured)

    monkeypatch.setattr(quality, "windows_perplexity", noted)
    arguments = command[2:]
    narrow = make_tiny_model(intermediate_size=40, seed=2)
    narrow.save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "narrow")
    assert fp8.main(arguments) == 0
    arguments = [*arguments, "--model", str(tmp_path / "narrow")]
    assert fp8.main(arguments) == 0 and fp8.main(arguments) == 0
    assert measured == [False, False, True, True] * 2
    records = read(tmp_path / "out" / "fp8.jsonl")
    assert [(r.provider, r.shape["text"], r.p50) for r in records[:4]] == [
        ("checkpoint", "one", 50.25),
        ("checkpoint", "two", 50.5),
        ("fp8", "one", 50.75),
        ("fp8", "two", 51.0),
    ]
    assert [r.shape["model"] for r in records] == ["model"] * 4 + ["narrow"] * 4
    assert records[-1].shape["neurons"] == 3 * 40 != records[0].shape["neurons"]
    table = (tmp_path / "out" / "fp8.md").read_text()
    assert table in capsys.readouterr().out
    assert "| model | one | 50.250 | 50.750 | +1.00% |" in table and "| model | two | 50.500 | 51.000 |" in table
    assert "| narrow | one | 51.250 | 51.750 | +0.98% |" in table
    assert fp8.main([*arguments, "--text=three=/nowhere"]) == 2 and "/nowhere" in capsys.readouterr().err
