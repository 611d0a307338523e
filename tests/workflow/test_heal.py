"""`heal` on a tiny random model: what it writes, what it measures, what it rejects."""

import dataclasses
import inspect
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import gluprune
from gluprune.cli import main
from gluprune.healing.training import Settings
from gluprune.io.folder import partial_folders
from gluprune.workflow.texts import OWN_TEXT
from tests.helpers.tokenizers import byte_tokenizer

FILES = {"config.json", "generation_config.json", "gluprune.json", "model.safetensors", "README.md", "tokenizer.json"}


@pytest.fixture
def source(tiny_model, tokenizer, tmp_path):
    """A dense model whose predictions are not uniform."""
    path = tmp_path / "source"
    model = tiny_model(seed=1, dtype=torch.bfloat16, vocab_size=len(tokenizer), initializer_range=0.3)
    gluprune.save(model, path, tokenizer)
    return path


@pytest.fixture
def pruned(source, tmp_path):
    gluprune.prune_checkpoint(source, tmp_path / "pruned", pruning_ratio=0.5, multiple_of=16)
    return tmp_path / "pruned"


@pytest.fixture
def brief(text):
    """Arguments of a short run: five steps."""
    return {
        "text": [text],
        "own_windows": 2,
        "tokens": 480,
        "length": 24,
        "batch": 4,
        "learning_rate": 3e-3,
        "device": "cpu",
    }


@pytest.fixture
def no_load(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr("gluprune.workflow.healing_work.load", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.parametrize("tokenizer", [False, True], indirect=True)
def test_what_is_written(pruned, source, tmp_path, brief, tokenizer, text, capsys):
    out = tmp_path / "out"
    report = gluprune.heal(pruned, source, out, **brief)
    assert {path.name for path in out.iterdir()} >= FILES and not partial_folders(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.intermediate_size == 48
    configs = [json.loads((folder / "config.json").read_text()) for folder in (pruned, out)]
    assert configs[0] == configs[1]
    assert report.tokens == 480 and len(report.losses) == 5 and report.losses[-1] < 0.9 * report.losses[0]
    prune, heal, measure = json.loads((out / "gluprune.json").read_text())["steps"]
    assert (prune["step"], heal["step"], measure["step"]) == ("prune", "heal", "measure")
    assert (heal["teacher"], heal["train"], heal["calibration"]["tokens"]) == ("source", "all", 480)
    assert heal["loss"] == {"first": report.losses[0], "last": report.losses[-1]}
    assert set(heal["calibration"]["texts"]) == {"notes.txt", OWN_TEXT}
    assert set(measure["texts"]) == {"last tenth of notes.txt"}
    card = (out / "README.md").read_text()
    assert "| teacher | source |" in card and f"{report.healed:.2f}, " in card
    assert [line[:6] for line in capsys.readouterr().err.splitlines() if " of 4: " in line] == [
        f"{number} of 4" for number in range(1, 5)
    ]
    # Perplexities are those of the public function on the text held apart, on the checkpoints.
    content = text.read_text()
    start = content.index("\n", len(content) - len(content) // 10) + 1
    ids = torch.tensor(tokenizer(content[start:], add_special_tokens=False).input_ids)
    begin = 1 if tokenizer("a").input_ids[0] == 1 else None
    for folder, value in ((source, report.dense), (pruned, report.pruned), (out, report.healed)):
        loaded = gluprune.load(folder, dtype=torch.float32).eval()
        assert gluprune.perplexity(loaded, ids, 24, windows=32, begin=begin) == value
    assert report.test_tokens == min(len(ids) - (begin is None), 32 * 24) and measure["perplexity"] == report.healed
    assert (report.length, measure["length"]) == (24, 24) and ", in windows of 24" in card
    assert f"on {report.test_tokens:,} tokens held apart, in windows of 24: last tenth of notes.txt" in str(report)
    long = dataclasses.replace(report, losses=[4.0, 2.0, *[9.0] * 16, 1.0, 2.0])
    assert "480 tokens in 20 steps; mean loss 3.0000 in the first tenth, 1.5000 in the last" in str(long)
    assert "healed" in str(report) and report.to_dict()["healed"] == report.healed


def test_it_trains_on_the_text_that_is_not_held_apart(pruned, source, tmp_path, brief, tokenizer, monkeypatch, capsys):
    from gluprune.workflow import healing_work

    seen, real = [], healing_work.train

    def recorded(student, teacher, windows, **options):
        seen.append(windows)
        return real(student, teacher, windows, **options)

    monkeypatch.setattr(healing_work, "train", recorded)
    other = tmp_path / "other.txt"
    other.write_text("Something else to read. " * 40)
    report = gluprune.heal(pruned, source, tmp_path / "out", **{**brief, "own_windows": 0}, test_text=[other])
    assert "1 of 4: read the text;" in capsys.readouterr().err
    assert report.texts == ["other.txt"]
    ids = tokenizer(brief["text"][0].read_text(), add_special_tokens=False).input_ids
    assert seen[0].flatten().tolist() == ids[: len(ids) // 24 * 24]


@pytest.mark.slow
def test_lora_is_merged(pruned, source, tmp_path, brief):
    pytest.importorskip("peft")
    report = gluprune.heal(pruned, source, tmp_path / "out", **brief, train="lora")
    assert report.losses[-1] < report.losses[0]
    before, after = (gluprune.load(folder).state_dict() for folder in (pruned, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


@pytest.mark.slow
def test_layers_of_different_widths(source, tmp_path, brief):
    model = gluprune.load(source)
    gluprune.prune(model, pruning_ratio=0.5, multiple_of=16, layers=[1])
    gluprune.save(model, tmp_path / "wide", byte_tokenizer())
    gluprune.heal(tmp_path / "wide", source, tmp_path / "out", **brief, train="mlp")
    assert gluprune.info(tmp_path / "out").widths == gluprune.info(tmp_path / "wide").widths == [101, 48, 101]


@pytest.mark.slow
def test_wikipedia_where_no_text_is_given(pruned, source, tmp_path, brief):
    report = gluprune.heal(pruned, source, tmp_path / "out", **{**brief, "text": ()})
    assert report.texts == ["last tenth of wikipedia"]
    steps = json.loads((tmp_path / "out/gluprune.json").read_text())["steps"]
    (heal,) = (step for step in steps if step["step"] == "heal")
    assert set(heal["calibration"]["texts"]) == {"wikipedia", OWN_TEXT}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"train": "head"}, "unknown train 'head'; allowed: all, mlp, lora"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"learning_rate": 1.5}, r"learning_rate must lie between 0 and 1 \(both excluded\), got 1.5"),
        ({"hidden_weight": -1.0}, "hidden_weight must be at least 0 and finite, got -1.0"),
        ({"dtype": "float16"}, "unknown dtype 'float16' for training; allowed: auto, float32, bfloat16"),
        ({"dtype": torch.int8}, "unknown dtype 'int8'; allowed: auto, float32, bfloat16, float16"),
        ({"device": "cuda:1"}, "unknown device 'cuda:1' for training; allowed: auto, cpu, cuda"),
        ({"own_windows": -1}, "own_windows must be at least 0, got -1"),
        ({"length": 100_000}, "notes.txt has .* tokens before its last tenth: one window needs 100000"),
        ({"length": 600}, r"the text to measure on \(last tenth of notes.txt\) has"),
    ],
)
def test_bad_arguments_are_noticed_before_a_model_is_loaded(pruned, source, tmp_path, brief, given, message, no_load):
    with pytest.raises(ValueError, match=message):
        gluprune.heal(pruned, source, tmp_path / "out", **{**brief, **given})
    assert not (tmp_path / "out").exists() and not partial_folders(tmp_path / "out")


def test_defaults_are_those_with_which_shrink_heals():
    parameters = inspect.signature(gluprune.heal).parameters
    for field in dataclasses.fields(Settings):
        assert parameters[field.name].default == field.default, field.name


def test_models_that_do_not_belong_together(pruned, source, tmp_path, brief, tiny_model, tokenizer, no_load):
    def saved(name, own=tokenizer, **options):
        model = tiny_model(seed=2, **{"vocab_size": len(tokenizer), **options})
        return gluprune.save(model, tmp_path / name, own)

    changed = byte_tokenizer()
    changed.add_tokens(["<|other|>"])
    uneven = tiny_model(seed=2, vocab_size=len(tokenizer))
    gluprune.prune(uneven, intermediate_size=32, layers=[1], multiple_of=1)
    uneven = gluprune.save(uneven, tmp_path / "uneven", tokenizer)
    for student, teacher, options, message in (
        (pruned, uneven, {}, "layer 1 has 48 neurons in pruned, 32 in teacher"),
        (pruned, pruned, {}, "pruned and teacher are the same model"),
        (source, pruned, {}, "101 neurons in pruned, 48 in teacher: give the pruned model first"),
        (pruned, saved("a", vocab_size=300), {}, "pruned has 259, teacher 300"),
        (pruned, saved("b", changed), {}, "the tokenizers of .* differ"),
        (pruned, saved("c", num_hidden_layers=4), {"hidden_weight": 0.5}, "pruned has 3 layers of size 32, teacher 4"),
        (pruned, tmp_path / "none", {}, "neither a model folder nor"),
    ):
        with pytest.raises(ValueError, match=message):
            gluprune.heal(student, teacher, tmp_path / "out", **brief, **options)
    assert not partial_folders(tmp_path / "out")


def test_a_teacher_that_is_not_the_dense_model(pruned, tmp_path, brief, tiny_model, tokenizer, monkeypatch, caplog):
    other = gluprune.save(tiny_model(num_hidden_layers=4, vocab_size=len(tokenizer)), tmp_path / "other", tokenizer)

    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr("gluprune.workflow.heal._run", stop)
    with pytest.raises(InterruptedError):
        gluprune.heal(pruned, other, tmp_path / "out", **brief)
    assert "the teacher is not the dense model: it is llama with 4 layers of size 32, the pruned model" in caplog.text


@pytest.mark.parametrize("model", ["pruned", "source"])
def test_the_output_lies_outside_both_models(pruned, source, tmp_path, brief, no_load, model):
    """Within one of them, what an interrupted run leaves would change the model, and no run would continue."""
    with pytest.raises(ValueError, match=f"must lie outside the source .*{model}"):
        gluprune.heal(pruned, source, tmp_path / model / "healed", **brief)
    assert not partial_folders(tmp_path / model / "healed")


def test_without_peft(pruned, source, tmp_path, brief, monkeypatch):
    monkeypatch.setattr("gluprune.healing.student.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs peft"):
        gluprune.heal(pruned, source, tmp_path / "out", **brief, train="lora")


def test_command(pruned, source, text, tmp_path, capsys):
    command = ["heal", str(pruned), "--teacher", str(source), "--text", str(text), "--own-windows", "0"]
    command += ["--tokens", "192", "--length", "24", "--batch", "4", "-q"]
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["folder"] == str(tmp_path / "out") and len(report["losses"]) == 2
    assert " of 4: " not in captured.err and "healing" not in captured.err
    for flags, message in [
        (["--learning-rate", "3"], "--learning-rate must lie between 0 and 1 (both excluded), got 3.0"),
        (["--device-batch", "0"], "--device-batch must be at least 1, got 0"),
        (["--length", "600"], "or text to measure on (--test-text)"),
    ]:
        assert main([*command, *flags, "--out", str(tmp_path / "other")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("gluprune heal: error: ") and message in error
