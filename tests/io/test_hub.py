"""Hub ids and the Hub's cache: the name and commit of a model that is on this disk."""

import shutil

import huggingface_hub
import pytest
from gluprune_evals.folder import StudyModel, fingerprint

import gluprune
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io.hub import HubModel, hub_model, is_hub_id, local_folder, model_name, stored_folder
from tests.helpers.tiny_models import make_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A cache with the model `me/tiny`."""
    cache = tmp_path / "hub"
    folder = cache / "models--me--tiny" / "snapshots" / COMMIT
    make_tiny_model(seed=1).save_pretrained(folder)
    refs = cache / "models--me--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def test_a_hub_id_and_its_snapshot_are_the_same_model(snapshot, tmp_path):
    for source in ("me/tiny", snapshot, str(snapshot), snapshot / "config.json"):
        assert hub_model(source) == HubModel("me/tiny", COMMIT)
        assert model_name(source) == "tiny"
    assert stored_folder("me/tiny") == snapshot == local_folder("me/tiny")
    found = StudyModel.find("me/tiny")
    assert (found.name, found.revision) == ("tiny", COMMIT[:16])
    assert StudyModel.find(snapshot).revision == found.revision and StudyModel.find(snapshot).name == "tiny"
    shutil.copytree(snapshot, tmp_path / "copy")
    assert hub_model(tmp_path / "copy") is None and fingerprint(tmp_path / "copy") != COMMIT[:16]


def test_everything_takes_the_id_offline(snapshot, tmp_path):
    model = gluprune.load("me/tiny")
    assert gluprune.info("me/tiny").to_dict() == gluprune.info(snapshot).to_dict()
    prune_checkpoint("me/tiny", tmp_path / "out", intermediate_size=64, multiple_of=1)
    gluprune.prune(model, intermediate_size=64, multiple_of=1)
    gluprune.save(model, tmp_path / "saved")
    for folder in ("out", "saved"):
        assert gluprune.info(tmp_path / folder).history.base_model == "me/tiny"
        assert gluprune.info(tmp_path / folder).history.base_commit == COMMIT


def test_what_is_not_in_the_cache(snapshot, tmp_path, monkeypatch):
    for source in ("me/other", tmp_path, "", "tiny", "a/b/c"):
        assert hub_model(source) is None
    assert stored_folder("me/other") is None and stored_folder("") is None and stored_folder(tmp_path) == tmp_path
    assert is_hub_id("me/other") and not is_hub_id(tmp_path) and not is_hub_id("a/b/c")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "other").mkdir(parents=True)
    assert not is_hub_id("me/other")


@pytest.mark.parametrize("source, name", [(".", "work"), ("./", "work"), ("..", "outer"), ("x/y/", "y"), ("me/z", "z")])
def test_names_of_folders(tmp_path, monkeypatch, source, name):
    (tmp_path / "outer" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "outer" / "work")
    assert model_name(source) == name
