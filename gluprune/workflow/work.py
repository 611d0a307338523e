"""The stages of `shrink`, each of which leaves its result in a work folder, where a later run finds it.

Stages read their input from the folder even if the same run wrote it, so that an interrupted run that continues writes
the same bytes as one that was not interrupted.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.collect import calibrate_to_file
from gluprune.calibration.running import is_half_on_cpu
from gluprune.calibration.sample import sample_text
from gluprune.calibration.statistics import Statistics
from gluprune.checkpoints.load_save import load, round_weights, save_like
from gluprune.healing.training import Settings as HealingSettings
from gluprune.io import atomic
from gluprune.io.folder import remove_partial_folders
from gluprune.models.device import loading_options
from gluprune.models.widths import layer_widths
from gluprune.pruning.prune import prune
from gluprune.pruning.recipe import Recipe
from gluprune.pruning.reconstruct import reconstruct
from gluprune.workflow.heal import heal_on
from gluprune.workflow.report import Point
from gluprune.workflow.texts import GivenTexts, HeldApart, Texts

_RECONSTRUCTION_WINDOWS = 64  # from each text: as in evals/results/default-text


@dataclass(frozen=True)
class Settings:
    """What decides the results of all stages, besides the model and the texts.

    Attributes:
        recipe: How the model is pruned.
        own_windows: Windows of text that the model writes. 0: none.
        windows: Windows of each text to calibrate on, at most.
        length: Tokens per window.
        device: Name of the device; see `gluprune.models.device.choose_device`.
        dtype: Dtype of the weights: that of the checkpoint with "auto".
    """

    recipe: Recipe
    own_windows: int
    windows: int
    length: int
    device: str
    dtype: str


class Work:
    """Results of stages in a folder: each is computed on first use, and found there afterwards.

    Args:
        folder: The work folder.
        source: Folder of the dense checkpoint.
        settings: How everything is computed.
        texts: The texts, without the model's own.
    """

    def __init__(self, folder: Path, source: Path, *, settings: Settings, texts: GivenTexts):
        self._folder, self._source, self.settings, self._given = folder, source, settings, texts
        self._measurements = folder / "measurements.json"

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier run has left results."""
        return any((self._folder / name).is_file() for name in ("own.txt", "statistics"))

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._source)

    @functools.cached_property
    def _dense(self) -> tuple[Any, torch.dtype]:
        """The dense model as it is computed with, and the dtype of its checkpoint."""
        return self._load(self._source)

    @functools.cached_property
    def _own_text(self) -> str:
        path, settings = self._folder / "own.txt", self.settings
        if settings.own_windows and not path.is_file():
            text = sample_text(self._dense[0], self._tokenizer, settings.own_windows, settings.length)
            atomic.write_file(path, [text.encode()])
        return path.read_text(encoding="utf-8") if settings.own_windows else ""

    @functools.cached_property
    def texts(self) -> Texts:
        """The texts to calibrate on and to measure on; at first the model writes its own."""
        return Texts.of(self._given, self._own_text)

    @functools.cached_property
    def held_apart(self) -> HeldApart:
        """The text that perplexity is measured on."""
        return HeldApart(self.texts.test, self._tokenizer, self.settings.length)

    def statistics(self) -> Path:
        """Return the file of the calibration statistics."""
        path = self._folder / "statistics"
        if not path.is_file():
            calibrate_to_file(
                self._dense[0],
                self._batches(self.settings.windows),
                path,
                sensitivity=True,
                texts=self.texts.calibration_digests,
            )
        return path

    def dense_point(self) -> Point:
        """Return the figures of the dense model."""
        return self._point("dense", lambda: self._dense[0], self._source)

    def point(self, width: int) -> Point:
        """Return the figures of the model that is pruned to a width, as loaded from its checkpoint."""
        checkpoint = self._folder / str(width)
        return self._point(str(width), lambda: self._load(self.checkpoint(width))[0], checkpoint)

    def _point(self, name: str, model: Callable[[], Any], checkpoint: Path) -> Point:
        found = json.loads(self._measurements.read_bytes()) if self._measurements.is_file() else {}
        if name not in found:
            loaded = model()
            value = self.held_apart.perplexity(loaded)
            widths = layer_widths(loaded.config)
            size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
            found[name] = asdict(Point(round(sum(widths) / len(widths)), value, size))
            atomic.write_file(self._measurements, [json.dumps(found).encode()])
        return Point(**found[name])

    def checkpoint(self, width: int) -> Path:
        """Return the folder of the model that is pruned to a width.

        Raises:
            RuntimeError: The checkpoint does not have the logits of the model in memory.
        """
        folder = self._folder / str(width)
        if not folder.is_dir():
            unchecked = self._folder / f"{width}.unchecked"
            remove_partial_folders(unchecked)
            shutil.rmtree(unchecked, ignore_errors=True)
            model = self._pruned(width)
            save_like(model, unchecked, self._source)
            expected = self._logits(self._widened(model))
            del model  # before the checkpoint is loaded: memory holds two models at a time
            if not torch.equal(expected, self._logits(self._load(unchecked)[0])):
                raise RuntimeError(f"{unchecked} does not have the logits of the model that was saved")
            atomic.rename(unchecked, folder)
        return folder

    def healed(self, width: int, tokens: int) -> tuple[Path, Point]:
        """Return the folder and the figures of the model that is pruned to a width and then healed on some tokens."""
        name = f"{width}.healed.{tokens}"
        folder, texts = self._folder / name, self.texts
        if not folder.is_dir():
            heal_on(
                GivenTexts(texts.calibration, texts.test, texts.digests),
                self.checkpoint(width),
                self._source,
                folder,
                HealingSettings(tokens=tokens, length=self.settings.length),
                own_windows=0,
                device=self.settings.device,
                dtype=self.settings.dtype,
            )
        return folder, self._point(name, lambda: self._load(folder)[0], folder)

    def remove(self, width: int) -> None:
        """Remove the checkpoint of a width that will not be chosen; its figures stay."""
        shutil.rmtree(self._folder / str(width), ignore_errors=True)

    def _pruned(self, width: int) -> Any:
        """Return a pruned copy of the dense model, in the dtype of the checkpoint."""
        (dense, dtype), recipe = self._dense, self.settings.recipe
        model = copy.deepcopy(dense)
        statistics = Statistics.load(self.statistics())
        prune(model, intermediate_size=width, **recipe.options(), calibration=statistics)
        if recipe.reconstruct:
            windows = min(_RECONSTRUCTION_WINDOWS, self.settings.windows)
            reconstruct(model, dense, self._batches(windows))
        round_weights(model, dtype)
        return model

    def _batches(self, windows: int) -> list[torch.Tensor]:
        return batches_from_text(self._tokenizer, list(self.texts.calibration.values()), windows, self.settings.length)

    @torch.no_grad()
    def _logits(self, model: Any) -> torch.Tensor:
        """Return the logits of a model on one window."""
        return model(self.held_apart.ids[None, : self.settings.length].to(model.device)).logits

    def _load(self, folder: Path) -> tuple[Any, torch.dtype]:
        """Return a model as it is computed with, and the dtype in which it was loaded."""
        model: Any = load(folder, dtype=self.settings.dtype, **loading_options(self.settings.device)).eval()
        dtype = model.dtype
        return self._widened(model), dtype

    def _widened(self, model: Any) -> Any:
        """Convert a model in half precision to float32 on a CPU, unless a dtype was asked for."""
        is_slow = self.settings.dtype == "auto" and is_half_on_cpu(next(model.parameters()))
        return model.float() if is_slow else model
