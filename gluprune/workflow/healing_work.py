"""The stages of `heal`, each of which leaves its result in a work folder, where a later run finds it."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments

from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.sample import sample_text
from gluprune.checkpoints.card import read_history
from gluprune.checkpoints.load_save import load, round_weights, write_like
from gluprune.healing.student import as_student, with_weights
from gluprune.healing.training import Settings, train
from gluprune.io import atomic
from gluprune.io.hub import model_name
from gluprune.io.progress import announce
from gluprune.models.widths import layer_widths
from gluprune.pruning.history import heal_step, measure_step, record
from gluprune.workflow.texts import GivenTexts, HeldApart, Texts


class HealingWork:
    """Results of stages in a folder. All processes call the same methods; the first one writes.

    Args:
        folder: The work folder.
        models: Folders of the student and of the teacher.
        texts: The texts, without the teacher's own.
        own_windows: Windows of text that the teacher writes.
        settings: How the student is trained.
        options: The arguments of the `Trainer`.
    """

    def __init__(
        self,
        folder: Path,
        models: tuple[Path, Path],
        *,
        texts: GivenTexts,
        own_windows: int,
        settings: Settings,
        options: TrainingArguments,
    ):
        self.settings, self._options, self._processes = settings, options, PartialState()
        self._folder, self._given, self._own_windows = folder, texts, own_windows
        self._pruned_folder, self._dense_folder = models
        self._measurements = folder / "measurements.json"
        self._device = options.device
        options._n_gpu = min(1, options.n_gpu)  # one process uses one GPU

    @property
    def is_first(self) -> bool:
        """Whether this is the first process."""
        return self._processes.is_main_process

    @property
    def trained_tokens(self) -> int:
        """On how many tokens the student is trained."""
        return self.settings.steps * self.settings.batch * self.settings.length

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier run has left results."""
        return (self._folder / "own.txt").is_file() or (self._folder / "training").is_dir()

    def announce(self, stage: str) -> None:
        """Print which stage begins, in the first process."""
        if self.is_first:
            announce(stage)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._pruned_folder)

    @functools.cached_property
    def _teacher(self) -> PreTrainedModel:
        dtype = torch.bfloat16 if self._options.bf16 else torch.float32
        return self._load(self._dense_folder, dtype)

    def _load(self, folder: Path, dtype: torch.dtype) -> Any:
        model: Any = load(folder, dtype=dtype).eval()
        return model.to(self._device)

    @functools.cached_property
    def _own_text(self) -> str:
        path = self._folder / "own.txt"
        if self._own_windows and self.is_first and not path.is_file():
            text = sample_text(self._teacher, self._tokenizer, self._own_windows, self.settings.length)
            atomic.write_file(path, [text.encode()])
        self._processes.wait_for_everyone()
        return path.read_text(encoding="utf-8") if self._own_windows else ""

    @functools.cached_property
    def texts(self) -> Texts:
        """The texts to train on and to measure on; at first the teacher writes its own."""
        return Texts.of(self._given, self._own_text)

    @functools.cached_property
    def held_apart(self) -> HeldApart:
        """The text that perplexity is measured on."""
        return HeldApart(self.texts.test, self._tokenizer, self.settings.length)

    def perplexities(self) -> dict[str, float]:
        """Return the perplexities of the dense and of the pruned model; in other processes than the first, nothing."""
        found: dict[str, float] = {}
        if self.is_first:
            found["dense"] = self._perplexity("dense", lambda: self._teacher)
            found["pruned"] = self._perplexity("pruned", lambda: self._load(self._pruned_folder, self._teacher.dtype))
        self._processes.wait_for_everyone()
        return found

    def _perplexity(self, name: str, model: Callable[[], PreTrainedModel]) -> float:
        known = json.loads(self._measurements.read_bytes()) if self._measurements.is_file() else {}
        if name not in known:
            known[name] = self.held_apart.perplexity(model())
            atomic.write_file(self._measurements, [json.dumps(known).encode()])
        return known[name]

    def train(self) -> tuple[list[float], dict[str, torch.Tensor]]:
        """Return the loss of every step and the weights of the trained student; see `healing.training.train`."""
        texts, settings = list(self.texts.calibration.values()), self.settings
        windows = torch.cat(batches_from_text(self._tokenizer, texts, sys.maxsize, settings.length))
        student = as_student(self._load(self._pruned_folder, torch.float32), settings.train, settings.hidden_weight)
        return train(student, self._teacher, windows, settings=settings, options=self._options)

    def write(self, folder: Path, losses: list[float], state: dict[str, torch.Tensor]) -> float:
        """Write the trained student to a folder, as the pruned checkpoint was written, and return its perplexity.

        Args:
            folder: The output.
            losses: Of every step.
            state: The student's weights.
        """
        model: Any = load(self._pruned_folder, dtype="auto")
        dtype = model.dtype
        model = with_weights(model.float(), state, self.settings.train)
        round_weights(model, dtype)
        calibration = {"tokens": self.trained_tokens, "texts": self.texts.calibration_digests}
        how = {"teacher": model_name(self._dense_folder), **asdict(self.settings)}
        record(model, heal_step(how, losses, calibration))
        shutil.rmtree(folder)  # of an interrupted run
        folder.mkdir()
        write_like(model, folder, self._pruned_folder)
        healed = self.held_apart.perplexity(self._load(folder, self._teacher.dtype))
        history = read_history(folder)
        assert history is not None
        step = measure_step(
            perplexity=healed,
            dense_perplexity=self._perplexity("dense", lambda: self._teacher),
            tokens=self.held_apart.tokens,
            length=self.settings.length,
            texts=self.texts.test_digests,
        )
        for name, content in history.documents([step], type(model).__name__, layer_widths(model.config)).items():
            atomic.write_file(folder / name, [content])
        return healed
