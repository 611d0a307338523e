"""A pruned checkpoint says where it comes from: its card and `gluprune.json`."""

import hashlib
import json
import shutil
from importlib import metadata
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import gluprune
from gluprune.calibration.collect import calibrate
from gluprune.checkpoints.card import read_history
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.cli import main
from gluprune.pruning.history import _version
from tests.helpers.calibrations import random_batches
from tests.helpers.streaming import contents

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nlicense: llama3.2\nlicense_link: LICENSE\ntags:\n- dense\n---\n# The dense model\n"


def written(folder):
    return json.loads((folder / "gluprune.json").read_text()), (folder / "README.md").read_text()


def test_a_checkpoint_pruned_on_disk(llama, tmp_path, capsys):
    (llama / "README.md").write_text(CARD)
    report = prune_checkpoint(llama, tmp_path / "out", pruning_ratio=0.25, multiple_of=1)
    history, card = written(tmp_path / "out")
    (step,) = history["steps"]
    assert (history["base_model"], history["base_commit"]) == ("llama", None)
    figures = {name: value for name, value in json.loads(json.dumps(report.to_dict())).items() if name in step}
    assert figures and {name: step[name] for name in figures} == figures
    assert (step["recipe"], step["multiple_of"], step["calibration"]) == ("maw_gud", 1, None)
    assert step["versions"]["torch"] == version("torch") and step["versions"]["gluprune"] == gluprune.__version__
    assert "# The dense model" not in card and "llama, pruned" in card and "25.0% removed" in card
    header = card.split("---\n")[1]
    assert "license: llama3.2\nlicense_link: LICENSE\n" in header and "dense" not in header
    assert 'AutoModelForCausalLM.from_pretrained(".")' in card

    assert main(["info", str(tmp_path / "out")]) == 0
    assert "made from        llama: maw_gud, 25.0% of the neurons removed" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["history"] == history
    assert main(["info", str(llama), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["history"] is None


def test_from_a_source_tree_that_is_not_installed(llama, tmp_path, monkeypatch):
    """`PYTHONPATH=checkout` is enough: no metadata of an installed package are needed."""
    found = metadata.distribution

    def distribution(name):
        if name == "gluprune":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    _version.cache_clear()
    prune_checkpoint(llama, tmp_path / "out", pruning_ratio=0.25, multiple_of=1)
    (step,) = written(tmp_path / "out")[0]["steps"]
    assert step["versions"]["gluprune"] == gluprune.__version__


def test_what_is_pruned_again_keeps_its_first_steps(llama, tmp_path):
    """On disk and in memory, from the dense model on."""
    prune_checkpoint(llama, tmp_path / "first", intermediate_size=40, multiple_of=1)
    prune_checkpoint(tmp_path / "first", tmp_path / "second", intermediate_size=30, multiple_of=1, layers=[1])
    model = gluprune.load(tmp_path / "first")
    gluprune.prune(model, intermediate_size=30, multiple_of=1, layers=[1])
    gluprune.save(model, tmp_path / "saved")
    assert written(tmp_path / "saved") == written(tmp_path / "second")
    history, card = written(tmp_path / "saved")
    assert history["base_model"] == "llama"
    assert [step["intermediate_size"] for step in history["steps"]] == [40, 30]
    assert 'gluprune.load(".")' in card and "AutoModel" not in card
    gluprune.save(gluprune.load(tmp_path / "saved"), tmp_path / "copy")
    assert written(tmp_path / "copy") == written(tmp_path / "saved")


def test_calibration_is_named_by_the_digest_of_its_text_or_statistics(llama, tmp_path):
    statistics = calibrate(gluprune.load(llama), [torch.arange(30).view(2, 15)])
    arguments = dict(pruning_ratio=0.4, multiple_of=1, score="hybrid", compensate=True)
    for name, texts in (("unknown", {}), ("known", {"notes.txt": "12ab"})):
        file = tmp_path / f"{name}.statistics"
        statistics.texts = texts
        statistics.save(file)
        prune_checkpoint(llama, tmp_path / name, **arguments, statistics=file)
        entry = written(tmp_path / name)[0]["steps"][0]["calibration"]
        assert (entry["tokens"], entry["texts"]) == (30, texts)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert entry.get("statistics") == (None if texts else digest)
        assert ("notes.txt, SHA-256 `12ab`" if texts else digest) in written(tmp_path / name)[1]


def test_reconstruction_is_a_step(tiny_model, tmp_path):
    dense, model = tiny_model(seed=1), tiny_model(seed=1)
    gluprune.prune(model, pruning_ratio=0.4, multiple_of=1)
    gluprune.reconstruct(model, dense, random_batches())
    gluprune.save(model, tmp_path / "out")
    history, card = written(tmp_path / "out")
    assert [step["step"] for step in history["steps"]] == ["prune", "reconstruct"]
    assert history["steps"][1]["calibration"] == {"tokens": 90} and "## Reconstruct" in card
    assert str(read_history(tmp_path / "out")) == "unknown: maw_gud, 39.6% of the neurons removed, then reconstruct"


def test_a_dense_model_has_no_history(tiny_model, tmp_path):
    gluprune.save(tiny_model(), tmp_path / "dense")
    assert not {"README.md", "gluprune.json"} & contents(tmp_path / "dense").keys()


@pytest.mark.parametrize("place", ["out", f"hub/models--me--tiny/snapshots/{COMMIT}"])
def test_a_model_from_nowhere_has_no_history(llama, tiny_model, tmp_path, monkeypatch, place):
    """Also where the working directory is a checkpoint with a history, or one of the Hub."""
    prune_checkpoint(llama, tmp_path / place, intermediate_size=20, multiple_of=1)
    monkeypatch.chdir(tmp_path / place)
    gluprune.save(tiny_model(), tmp_path / "dense")
    assert not {"README.md", "gluprune.json"} & contents(tmp_path / "dense").keys()
    model = tiny_model()
    gluprune.prune(model, intermediate_size=20, multiple_of=1)
    gluprune.save(model, tmp_path / "saved")
    history, _ = written(tmp_path / "saved")
    assert (history["base_model"], history["base_commit"], len(history["steps"])) == ("", None, 1)


def test_a_local_model_is_known_from_another_folder(llama, tmp_path, monkeypatch):
    """`parent/llama` is no Hub id, wherever the model is saved; the card names the folder, not its path."""
    (llama / "README.md").write_text(CARD)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path.parent)
    model = gluprune.load(f"{tmp_path.name}/llama")
    monkeypatch.chdir(tmp_path / "elsewhere")
    gluprune.prune(model, intermediate_size=20, multiple_of=1)
    gluprune.save(model, tmp_path / "saved")
    history, card = written(tmp_path / "saved")
    assert history["base_model"] == "llama" and history["licence"]
    assert "huggingface.co" not in card
    assert not any(tmp_path.name.encode() in content for name, content in contents(tmp_path / "saved").items())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_licence_in_a_card(llama, tmp_path, end):
    (llama / "README.md").write_bytes(CARD.replace("\n", end).encode())
    prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1)
    history, card = written(tmp_path / "out")
    assert history["licence"] == ["license: llama3.2", "license_link: LICENSE"]
    assert "license: llama3.2\nlicense_link: LICENSE\n" in card.split("---\n")[1]


def test_the_hubs_name_and_commit_of_a_cached_model(llama, tmp_path):
    snapshot = tmp_path / "hub" / "models--me--tiny" / "snapshots" / COMMIT
    shutil.copytree(llama, snapshot)
    prune_checkpoint(snapshot, tmp_path / "out", intermediate_size=20, multiple_of=1)
    history, card = written(tmp_path / "out")
    assert (history["base_model"], history["base_commit"]) == ("me/tiny", COMMIT)
    assert "base_model: me/tiny\n" in card and f"at commit {COMMIT}" in card
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    gluprune.prune(model, intermediate_size=20, multiple_of=1)
    gluprune.save(model, tmp_path / "saved")
    assert written(tmp_path / "saved") == (history, card)


def test_the_card_of_another_class(llama, tmp_path):
    LlamaForSequenceClassification.from_pretrained(llama, num_labels=1).save_pretrained(tmp_path / "reward")
    prune_checkpoint(tmp_path / "reward", tmp_path / "out", intermediate_size=20, multiple_of=1)
    assert 'LlamaForSequenceClassification.from_pretrained(".")' in written(tmp_path / "out")[1]


STEP = '{"base_model": "a", "base_commit": null, "licence": [], "steps": [{"step": "reconstruct", "calibration": %s}]}'


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"base_model": 1, "base_commit": 2, "steps": 3, "licence": 4}'),
        *(STEP % calibration for calibration in ('"text"', '{"texts": ["a"]}', '{"texts": {"a": []}}')),
    ],
)
def test_an_unreadable_history_is_none(llama, tmp_path, content):
    (llama / "gluprune.json").write_text(content)
    assert read_history(llama) is None
    prune_checkpoint(llama, tmp_path / "out", intermediate_size=20, multiple_of=1)
    assert written(tmp_path / "out")[0]["base_model"] == "llama"
