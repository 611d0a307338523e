"""The results of a study on disk, and the models that they describe."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from gluprune.checkpoints.load_save import read_config
from gluprune.io import atomic
from gluprune.io.hub import hub_model, model_name
from gluprune_evals.configuration import Configuration
from gluprune_evals.harness import Result

_SAMPLED = 1 << 20  # bytes at each end of a weight file that go into its fingerprint


class Folder:
    """The folder of a study."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def common(self) -> Path:
        """The file with what all results have in common."""
        return self.path / "study.json"

    def claim(self, settings: dict, pinned: dict) -> None:
        """Write what the results have in common, or check that it equals what this folder holds.

        Args:
            settings: What all results share.
            pinned: What only some results share, such as the state of a model; added when first needed.

        Raises:
            ValueError: The folder holds another study (the message names the difference), or something else.
        """
        known = {}
        if self.common.is_file():
            known = json.loads(self.common.read_text(encoding="utf-8"))
        elif any(path.suffix != ".unfinished" for path in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and does not hold a study")
        merged = settings | pinned | known
        for name, value in (settings | pinned).items():
            if merged[name] != value:
                advice = "use another folder" if self._files() else "it has no results yet: delete it if it failed"
                raise ValueError(
                    f"{self.path} holds a study with {name} {merged[name]!r}, but this one has {value!r}: {advice}"
                )
        if merged != known:
            atomic.write_file(self.common, [json.dumps(merged, indent=1).encode() + b"\n"])

    def file(self, model: str, configuration: Configuration, task: str) -> Path:
        """Return the path of a result."""
        return self.path / model / str(configuration) / f"{task}.json"

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*/*/*.json"))

    def results(self) -> list[Result]:
        """Return all results, dense first, then by recipe and ratio.

        Raises:
            ValueError: There is no study, or a file that is not a result.
        """
        if not self.common.is_file():
            raise ValueError(f"{self.path} holds no study (no {self.common.name})")
        found = []
        for path in self._files():
            try:
                found.append(Result.from_json(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return sorted(found, key=lambda r: (r.model, r.configuration["recipe"] or "", r.configuration["ratio"]))


@dataclass(frozen=True)
class StudyModel:
    """A model to study.

    Attributes:
        path: Folder or Hub id.
        name: Its name in results.
        revision: Its fingerprint.
    """

    path: str
    name: str
    revision: str

    @classmethod
    def find(cls, path: str | Path) -> StudyModel:
        """Return the model of a folder or Hub id.

        Raises:
            ValueError: There is no such model.
        """
        read_config(path)
        return cls(str(path), model_name(path), fingerprint(path))


def fingerprint(path: str | Path) -> str:
    """Return what identifies the state of a model: the Hub's commit, or a digest of a local checkpoint.

    The digest is of the config, and of each weight file's size, beginning and end.
    """
    if model := hub_model(path):
        return model.commit[:16]
    state = hashlib.sha256()
    for file in [*sorted(Path(path).glob("*.safetensors")), Path(path) / "config.json"]:
        size = file.stat().st_size
        state.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            state.update(content.read(_SAMPLED))
            content.seek(max(0, size - _SAMPLED))
            state.update(content.read(_SAMPLED))
    return state.hexdigest()[:16]
