"""`shrink` on a tiny random model: what it writes, what it measures, what it rejects."""

import copy
import json
from hashlib import sha256

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import gluprune
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.cli import main
from gluprune.io.folder import partial_folders
from gluprune.workflow import shrink as module
from gluprune.workflow import work
from gluprune.workflow.texts import OWN_TEXT
from tests.helpers.composite_models import composite_model
from tests.helpers.tokenizers import byte_tokenizer

LENGTH = 24
FILES = ("config.json", "generation_config.json", "gluprune.json", "model.safetensors", "README.md", "shrink.png")


def test_what_is_written(source, text, tmp_path, short, capsys):
    out = tmp_path / "out"
    report = gluprune.shrink(source, out, pruning_ratio=0.2, **short)
    assert report.chosen.width == 80 and report.dense.width == 101 and report.curve == [report.chosen]
    assert set(FILES) <= {path.name for path in out.iterdir()} and (out / "tokenizer.json").is_file()
    assert not partial_folders(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.intermediate_size == 80
    history = json.loads((out / "gluprune.json").read_text())
    prune, reconstruct, measure = history["steps"]
    assert (prune["recipe"], prune["intermediate_size"], reconstruct["step"]) == (
        "surgeon+compensate",
        80,
        "reconstruct",
    )
    assert set(prune["calibration"]["texts"]) == {"notes.txt", OWN_TEXT}
    assert set(measure["texts"]) == {"last tenth of notes.txt"} == set(report.texts)
    assert (measure["perplexity"], measure["dense_perplexity"]) == (report.chosen.perplexity, report.dense.perplexity)
    card = (out / "README.md").read_text()
    assert "![perplexity against width](shrink.png)" in card and f"{report.chosen.perplexity:.2f}, " in card
    assert (out / "shrink.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert report.chosen.bytes == (out / "model.safetensors").stat().st_size < report.dense.bytes
    assert "measured: perplexity" in str(gluprune.info(out)) and str(out) in str(report)
    assert [line[:6] for line in capsys.readouterr().err.splitlines() if " of 5: " in line] == [
        f"{number} of 5" for number in range(1, 6)
    ]


@pytest.mark.parametrize("tokenizer", [False, True], indirect=True)
def test_equals_the_public_functions(source, text, tmp_path, short, tokenizer, capsys):
    """The same weights and perplexities as calibrate, prune, reconstruct and perplexity one after the other."""
    report = gluprune.shrink(source, tmp_path / "out", pruning_ratio=0.2, **{**short, "own_windows": 0})
    stages = capsys.readouterr().err
    assert "1 of 5: read the text;" in stages and "writes text" not in stages
    assert "4 of 5: prune to 80 of 101 neurons (20.8%; widths are multiples of 16)" in stages
    content = text.read_text()
    start = len(content) - len(content) // 10
    start = content.index("\n", start) + 1
    dense = gluprune.load(source, dtype=torch.float32).eval()
    batches = gluprune.batches_from_text(tokenizer, content[:start], 6, LENGTH)
    statistics = gluprune.calibrate(dense, batches, sensitivity=True)
    model = copy.deepcopy(dense)
    recipe = gluprune.Recipe.parse("surgeon+compensate", multiple_of=16)
    gluprune.prune(model, pruning_ratio=0.2, **recipe.options(), calibration=statistics)
    gluprune.reconstruct(model, dense, batches)
    written = gluprune.load(tmp_path / "out")
    for (name, expected), found in zip(model.named_parameters(), written.parameters(), strict=True):
        assert torch.equal(expected.bfloat16(), found), name
    ids = torch.tensor(tokenizer(content[start:], add_special_tokens=False).input_ids)
    begin = 1 if tokenizer("a").input_ids[0] == 1 else None
    windows = {"length": LENGTH, "windows": 32, "begin": begin}
    assert report.dense.perplexity == gluprune.perplexity(dense, ids, **windows)
    assert report.chosen.perplexity == gluprune.perplexity(written.float(), ids, **windows)
    assert report.tokens == min(len(ids) - (begin is None), 32 * LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "glm4"])
def test_families_with_a_norm_behind_the_mlp(family, tiny_model, tokenizer, tmp_path, short):
    """They are reconstructed, too, and written as stock checkpoints."""
    source, out = tmp_path / "source", tmp_path / "out"
    gluprune.save(tiny_model(family, seed=1, dtype=torch.bfloat16, vocab_size=len(tokenizer)), source, tokenizer)
    report = gluprune.shrink(source, out, pruning_ratio=0.4, **short)
    assert report.recipe == "surgeon+compensate+reconstruct"
    steps = json.loads((out / "gluprune.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["prune", "reconstruct", "measure"]
    model, same = AutoModelForCausalLM.from_pretrained(out), gluprune.load(out)
    assert model.config.intermediate_size == 64
    for (name, expected), found in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize("windows, used", [(100, 64), (40, 40)])
def test_text_of_the_reconstruction(source, tmp_path, short, monkeypatch, windows, used):
    """Half of the default of 128 windows of each text to calibrate on; all of fewer."""
    asked, real = [], work.batches_from_text

    def counting(tokenizer, texts, count, length):
        asked.append(count)
        return real(tokenizer, texts, count, length)

    monkeypatch.setattr(work, "batches_from_text", counting)
    gluprune.shrink(source, tmp_path / "out", pruning_ratio=0.2, **short | {"windows": windows})
    assert asked == [windows, used]


@pytest.mark.slow
def test_the_text_to_measure_on(source, text, tmp_path, short):
    """Own files, or a part of Wikipedia; never what was calibrated on."""
    other = tmp_path / "other.txt"
    other.write_text("Something else to read. " * 40)
    report = gluprune.shrink(source, tmp_path / "a", pruning_ratio=0.2, **short, test_text=[other])
    assert report.texts == ["other.txt"]
    report = gluprune.shrink(source, tmp_path / "b", pruning_ratio=0.2, **{**short, "text": ()})
    assert report.texts == ["last tenth of wikipedia"] and report.tokens == 32 * LENGTH
    with pytest.raises(ValueError, match="two texts are equal, .* text .*notes.txt; test_text .*notes.txt"):
        gluprune.shrink(source, tmp_path / "c", pruning_ratio=0.2, **short, test_text=[text])


@pytest.mark.slow
def test_layers_of_different_widths(source, tmp_path, short):
    report = gluprune.shrink(source, tmp_path / "out", pruning_ratio=0.3, **short, allocation="sensitivity")
    model = gluprune.load(tmp_path / "out")
    widths = gluprune.info(tmp_path / "out").widths
    assert "sensitivity" in report.recipe and sum(widths) <= 3 * 72
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == widths


def perplexities(monkeypatch, loss):
    """Replace what is measured: `loss(width)` above dense."""
    monkeypatch.setattr(
        "gluprune.workflow.texts.perplexity",
        lambda model, *_, **__: 10 * (1 + loss(model.config.intermediate_size)),
    )


@pytest.mark.slow
def test_max_loss_chooses_the_narrowest_width(source, tmp_path, short, monkeypatch):
    perplexities(monkeypatch, lambda width: (101 - width) / 101)
    report = gluprune.shrink(source, tmp_path / "out", max_loss=0.4, **short)
    assert report.chosen.width == 64 and report.loss == pytest.approx(37 / 101)  # 48 loses 53/101
    measured = [point.width for point in report.curve]
    assert measured == sorted(measured, reverse=True) and {64, 48} <= set(measured)
    assert gluprune.info(tmp_path / "out").widths == [64] * 3
    assert report.to_dict()["loss"] == report.loss and "<- written" in str(report)


@pytest.mark.slow
def test_no_width_within_max_loss_keeps_what_was_computed(source, tmp_path, short, monkeypatch):
    out = tmp_path / "out"
    perplexities(monkeypatch, lambda width: (101 - width) / 101)
    with pytest.raises(RuntimeError, match=r"at 96 of 101 neurons, .*5.0% above dense; max_loss=0.01 allows less"):
        gluprune.shrink(source, out, max_loss=0.01, **short)
    assert not out.exists() and len(partial_folders(out)) == 1
    monkeypatch.setattr("gluprune.workflow.work.calibrate_to_file", lambda *_, **__: pytest.fail("calibrated again"))
    assert gluprune.shrink(source, out, max_loss=0.1, **short).chosen.width == 96
    assert not partial_folders(out)


@pytest.mark.slow
def test_arguments_of_other_types(source, text, tmp_path, short):
    """One path in place of a list, a dtype and a device of torch: the same checkpoint as by name."""
    kept = {key: value for key, value in short.items() if key not in ("text", "dtype", "device")}
    for name, given in (
        ("types", {"text": text, "dtype": torch.float32, "device": torch.device("cpu")}),
        ("names", {"text": [str(text)], "dtype": "float32", "device": "cpu"}),
    ):
        gluprune.shrink(source, tmp_path / name, pruning_ratio=np.float64(0.2), **kept, **given)
    for file in ("model.safetensors", "gluprune.json"):
        assert (tmp_path / "types" / file).read_bytes() == (tmp_path / "names" / file).read_bytes()


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "give exactly one of pruning_ratio and max_loss"),
        ({"pruning_ratio": 0.2, "max_loss": 0.1}, "give exactly one of pruning_ratio and max_loss"),
        ({"max_loss": 1.5}, "max_loss must be above 0 and at most 1, got 1.5$"),
        ({"max_loss": 5}, "max_loss must be above 0 and at most 1, got 5: did you mean 0.05?"),
        ({"pruning_ratio": 20}, "did you mean 0.2"),
        ({"pruning_ratio": 0.2, "windows": 1}, "windows must be at least 2, got 1"),
        ({"pruning_ratio": 0.2, "length": 0}, "length must be at least 1, got 0"),
        ({"pruning_ratio": 0.2, "heal_tokens": -1}, "heal_tokens must be at least 0, got -1"),
        ({"pruning_ratio": 0.2, "heal_tokens": 9, "dtype": "float16"}, "unknown dtype 'float16' for training"),
        ({"pruning_ratio": 0.2, "dtype": "bf16"}, "unknown dtype 'bf16'; allowed: auto, float32, bfloat16, float16"),
        ({"pruning_ratio": 0.2, "dtype": torch.int8}, "unknown dtype 'int8'; allowed"),
        ({"pruning_ratio": 0.2, "device": "mps"}, "unknown device 'mps'; allowed: auto, cpu, cuda"),
        ({"pruning_ratio": 0.2, "own_windows": -1}, "own_windows must be at least 0, got -1"),
        ({"pruning_ratio": 0.2, "length": 600}, r"the text to measure on \(last tenth of notes.txt\) has"),
        ({"pruning_ratio": 0.2, "length": 900, "own_windows": 0, "test_text": ["wikipedia"]}, "has one window of 900"),
        ({"max_loss": 0.1, "multiple_of": 128}, "no multiple of 128 is below the width 101"),
        ({"max_loss": 0.1, "deploy": "llama.cpp"}, "no multiple of 256 is below the width 101"),
        ({"pruning_ratio": 0.2, "deploy": "ollama"}, "unknown deploy 'ollama'"),
        ({"pruning_ratio": 0.2, "allocation": "best"}, "unknown allocation 'best'"),
        (
            {"pruning_ratio": 0.95, "allocation": "sensitivity", "multiple_of": 4},
            "allocation='sensitivity' leaves every layer at least 16 of 101 neurons, which is more than 8",
        ),
    ],
)
def test_bad_input_is_noticed_before_a_model_is_loaded(source, tmp_path, short, given, message, monkeypatch):
    monkeypatch.setattr("gluprune.workflow.work.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        gluprune.shrink(source, tmp_path / "out", **{**short, **given})
    assert not (tmp_path / "out").exists() and not partial_folders(tmp_path / "out")


def test_a_checkpoint_that_does_not_reload_equal_is_an_error(source, tmp_path, short, monkeypatch):
    from gluprune.workflow import work

    def spoiled(model, folder, source):
        found = save_like(model, folder, source)
        model.model.norm.weight.data.mul_(2)
        return found

    save_like = work.save_like
    monkeypatch.setattr(work, "save_like", spoiled)
    with pytest.raises(RuntimeError, match="does not have the logits of the model that was saved"):
        gluprune.shrink(source, tmp_path / "out", pruning_ratio=0.2, **short)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_finished_stages_are_kept_after_any_error(source, tmp_path, short, monkeypatch):
    def refused(*_, **__):
        raise ValueError("not today")

    out, real = tmp_path / "out", work.prune
    monkeypatch.setattr(work, "prune", refused)
    with pytest.raises(ValueError, match="not today"):
        gluprune.shrink(source, out, pruning_ratio=0.2, **short)
    (left,) = partial_folders(out)
    assert (left / "statistics").is_file() and not out.exists()
    monkeypatch.setattr(work, "prune", real)
    monkeypatch.setattr(work, "calibrate_to_file", lambda *_, **__: pytest.fail("calibrated again"))
    assert gluprune.shrink(source, out, pruning_ratio=0.2, **short).chosen.width == 80
    assert not partial_folders(out)


def test_layers_that_attend_to_images(tmp_path, short, monkeypatch):
    monkeypatch.setattr(work, "load", lambda *_, **__: pytest.fail("loaded"))
    gluprune.save(composite_model("mllama"), tmp_path / "source", byte_tokenizer())
    with pytest.raises(ValueError, match="layers 1 attend to images and do not run on text: shrink cannot calibrate"):
        gluprune.shrink(tmp_path / "source", tmp_path / "out", pruning_ratio=0.2, **short)


def test_without_matplotlib_there_is_no_picture(source, tmp_path, short, monkeypatch, caplog):
    real = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    report = gluprune.shrink(source, tmp_path / "out", pruning_ratio=0.2, **short)
    assert report.picture is None and not (tmp_path / "out" / "shrink.png").exists()
    assert "gluprune[demo]" in caplog.text and "shrink.png" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["notes.txt", "notes.jsonl"])
def test_healed(source, text, tmp_path, short, monkeypatch, name):
    """The chosen model is healed on the calibration text, and what is written and reported is the healed one."""
    seen, real = [], work.heal_on

    def recorded(texts, *models, **options):
        seen.append(texts)
        return real(texts, *models, **options)

    monkeypatch.setattr(work, "heal_on", recorded)
    content = text.read_text()
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": content}))
    out = tmp_path / "out"
    report = gluprune.shrink(source, out, pruning_ratio=0.5, **{**short, "text": tmp_path / name}, heal_tokens=800)
    pruned, healed = report.curve
    assert report.chosen == healed and healed.width == pruned.width == 48 and healed.perplexity != pruned.perplexity
    steps = json.loads((out / "gluprune.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["prune", "reconstruct", "heal", "measure"]
    assert steps[-1]["perplexity"] == healed.perplexity and steps[2]["batch"] == 16
    digests = steps[2]["calibration"]["texts"]
    assert digests[name] == sha256((tmp_path / name).read_bytes()).hexdigest()
    assert digests == steps[0]["calibration"]["texts"] and set(digests) == {name, OWN_TEXT}
    assert steps[-1]["texts"] == {f"last tenth of {name}": digests[name]}
    assert "<- healed, written" in str(report) and not partial_folders(out)
    (given,) = seen
    held_apart = given.test[f"last tenth of {name}"]
    assert given.calibration[name] + held_apart == content and set(given.calibration) == {name, OWN_TEXT}
    model = gluprune.load(out, dtype=torch.float32).eval()
    ids = torch.tensor(byte_tokenizer()(held_apart, add_special_tokens=False).input_ids)
    assert gluprune.perplexity(model, ids, LENGTH, windows=32) == healed.perplexity


@pytest.mark.slow
def test_pruned_further(source, tmp_path, short):
    """The picture and the card of the first step are not those of the second."""
    gluprune.shrink(source, tmp_path / "a", pruning_ratio=0.2, **short)
    prune_checkpoint(tmp_path / "a", tmp_path / "b", intermediate_size=64, multiple_of=16)
    assert not (tmp_path / "b" / "shrink.png").exists()
    assert "shrink.png" not in (tmp_path / "b" / "README.md").read_text()
    steps = json.loads((tmp_path / "b" / "gluprune.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["prune", "reconstruct", "measure", "prune"]


def test_command(source, text, tmp_path, capsys):
    command = ["shrink", str(source), "--text", str(text), "--windows", "6", "--length", "24", "--multiple-of", "16"]
    command += ["--own-windows", "0", "-q"]
    assert main([*command, "--out", str(tmp_path / "out"), "--ratio", "0.2", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["chosen"]["width"] == 80 and report["folder"] == str(tmp_path / "out")
    assert " of 5: " not in captured.err
    for flags, message in [
        ([], "give exactly one of --ratio and --max-loss"),
        (["--ratio", "20"], "--ratio must lie between 0 and 1 (both excluded), got 20.0: did you mean 0.2?"),
        (["--max-loss", "5"], "--max-loss must be above 0 and at most 1, got 5.0: did you mean 0.05?"),
        (["--ratio", "0.2", "--length", "600"], "or text to measure on (--test-text)"),
    ]:
        assert main([*command, *flags, "--out", str(tmp_path / "other")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("gluprune shrink: error: ") and message in error
