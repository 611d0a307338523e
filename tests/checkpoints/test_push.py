"""`push_to_hub`, with a stub in the place of the Hub."""

from types import SimpleNamespace

import huggingface_hub
import pytest

import gluprune
from tests.helpers.tiny_models import make_tiny_model


@pytest.fixture
def calls(monkeypatch):
    """What the Hub's client is asked for, in order."""
    found = []

    class Stub:
        def create_repo(self, name, *, private, exist_ok):
            found.append(("create", name, private, exist_ok))
            if name == "me/taken":
                raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required.\nLog in.")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            found.append(("upload", repo_id, folder_path, commit_message))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Stub)
    return found


@pytest.fixture
def narrow(tmp_path):
    make_tiny_model().save_pretrained(tmp_path / "dense")
    model = gluprune.load(tmp_path / "dense")
    gluprune.prune(model, intermediate_size=64, multiple_of=1)
    return gluprune.save(model, tmp_path / "narrow")


def test_one_commit_of_the_whole_folder(narrow, calls):
    assert gluprune.push_to_hub(str(narrow), "me/narrow") == "https://hub/me/narrow/commit/1"
    message = f"Upload by gluprune, pruned from {gluprune.info(narrow).history.base_model}"
    assert calls == [("create", "me/narrow", True, True), ("upload", "me/narrow", narrow, message)]
    gluprune.push_to_hub(narrow.parent / "dense", "me/narrow", private=False)
    assert calls[2:] == [
        ("create", "me/narrow", False, True),
        ("upload", "me/narrow", narrow.parent / "dense", "Upload by gluprune"),
    ]


def test_nothing_is_asked_for_with_bad_input(narrow, calls):
    (narrow.parent / "empty").mkdir()
    for folder, name, message in (
        (narrow, "narrow", "'narrow' is not a name on the Hub: give owner/name"),
        (narrow.parent / "absent", "me/narrow", "absent does not exist"),
        (narrow.parent / "empty", "me/narrow", "empty/config.json does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            gluprune.push_to_hub(folder, name)
    weights = narrow / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors"):
        gluprune.push_to_hub(narrow, "me/narrow")
    assert calls == []


def test_what_the_hub_refuses(narrow, calls):
    with pytest.raises(RuntimeError, match=r"could not upload .*narrow to me/taken: Token is required\.$"):
        gluprune.push_to_hub(narrow, "me/taken")
    assert [call[0] for call in calls] == ["create"]
