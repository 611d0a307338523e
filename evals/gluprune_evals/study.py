"""The study: models x configurations x tasks in one folder; an interrupted run can be continued.

A folder holds `study.json`, what all of its results have in common, and one file for each result,
`<model>/<configuration>/<task>.json`, which is written when the task ends and gets its name only when it is complete.
An existing result is never computed again; a folder rejects results of another study.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.collect import calibrate
from gluprune.calibration.statistics import VERSION, Statistics
from gluprune.checkpoints.load_save import build_empty, load, read_config, save
from gluprune.demo.smollm2 import cache_folder
from gluprune.io import atomic
from gluprune.io.progress import progress
from gluprune.models.device import AUTO, choose_device, loading_options
from gluprune.models.glu import check_head, count_parameters, model_glus
from gluprune.pruning.prune import prune
from gluprune.pruning.recipe import Recipe
from gluprune.runtime.patching import patch_llama
from gluprune_evals.configuration import Configuration
from gluprune_evals.digests import digest
from gluprune_evals.folder import Folder, StudyModel
from gluprune_evals.harness import Result, evaluate, model_by_backend, model_in_memory, require_lm_eval
from gluprune_evals.tasks import Limits, check_data, check_tasks

CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 128, 512


@dataclass(frozen=True)
class Settings:
    """Settings that all results of a folder share, and how the results are computed.

    Attributes:
        limits: Which documents are run.
        data: Local files. None: the Hub's data.
        dtype: Dtype of the weights.
        device: Where models in memory run; see `gluprune.models.device.choose_device`.
        calibration: Texts for the recipes that need calibration.
        windows: Number of windows per text.
        patch: Whether the model runs with `patch_llama`.
        backend: Run a checkpoint in this backend of lm-eval instead of the model in memory.
        model_args: Arguments of the backend.
        log_samples: Keep requests, answers and generated lengths.

    Raises:
        ValueError: Incompatible settings, or a data folder that does not exist.
    """

    limits: Limits = field(default_factory=Limits)
    data: Path | None = None
    dtype: str = "auto"
    device: str = AUTO
    calibration: tuple[str, ...] = ()
    windows: int = CALIBRATION_WINDOWS
    patch: bool = False
    backend: str | None = None
    model_args: str = ""
    log_samples: bool = False

    def __post_init__(self):
        if self.patch and self.backend:
            raise ValueError("--patch patches a model in memory, --backend loads a checkpoint: give one of them")
        if self.model_args and not self.backend:
            raise ValueError("--model-args needs --backend")
        if self.data is not None and not self.data.is_dir():
            raise ValueError(f"data folder {self.data} does not exist")
        choose_device(self.device)

    def identity(self) -> dict:
        """Return what two results must share to appear in one table."""
        return {
            "limits": str(self.limits),
            "subset": self.limits.subset(),
            "data": "Hub" if self.data is None else "local files",
            "dtype": self.dtype,
            "patched": self.patch,
            "backend": self.backend or "in memory",
            "model_args": self.model_args,
            "lm_eval": version("lm-eval"),
        }

    def calibration_identity(self) -> str:
        """Return what two results of calibrated recipes must share as well."""
        texts = ", ".join(f"text {hashlib.sha256(text.encode()).hexdigest()[:16]}" for text in self.calibration)
        return f"{texts}, {self.windows} windows of {CALIBRATION_LENGTH} tokens"


def run(
    folder: Folder,
    models: Sequence[StudyModel],
    configurations: Sequence[Configuration],
    tasks: Sequence[str],
    settings: Settings,
) -> list[Result]:
    """Compute every result that the folder does not hold yet; an interrupted run is continued.

    Several processes may work on one folder, each on its own GPU: a process takes the configurations that no other is
    working on.

    Args:
        folder: Folder for the results.
        models: The models to study.
        configurations: Pruning ratios and recipes.
        tasks: Names in `TASKS`.
        settings: How to run them.

    Returns:
        All results of the folder.

    Raises:
        ValueError: The folder holds another study, or the input is invalid; nothing is evaluated.
        RuntimeError: Data is not available; finished results stay.
        OSError: The disk is full; finished results stay.
    """
    require_lm_eval()
    tasks = check_tasks(tasks)
    calibrated = any(c.recipe and c.recipe.needs.calibration for c in configurations)
    _check(models, calibrated, settings)
    for model in models if calibrated else ():
        _batches(model, settings, windows=1)  # raises for a text that is too short, before hours of scoring
    if settings.data is not None:
        check_data(tasks, settings.data)
    is_first = int(os.environ.get("RANK", "0")) == 0  # accelerate and torchrun start one process for each rank
    if is_first:
        folder.path.mkdir(parents=True, exist_ok=True)
        with atomic.locked(folder.path):
            pinned = {f"revision of {model.name}": model.revision for model in models}
            if calibrated:
                pinned["calibration"] = settings.calibration_identity()
            folder.claim(settings.identity(), pinned)
    pairs = [(model, configuration) for model in models for configuration in configurations]
    with progress(total=len(pairs) * len(tasks), unit="task", desc="study") as bar:
        for model, configuration in pairs:
            with contextlib.ExitStack() as stack:
                if is_first:
                    place = folder.file(model.name, configuration, "").parent
                    place.mkdir(parents=True, exist_ok=True)
                    try:
                        stack.enter_context(atomic.locked(place))
                    except ValueError:  # another process is working on it
                        bar.update(len(tasks))
                        continue
                _evaluate_missing(
                    folder,
                    model,
                    configuration,
                    tasks=tasks,
                    settings=settings,
                    is_first=is_first,
                    bar=bar,
                )
    return folder.results() if is_first else []


def _check(models: Sequence[StudyModel], calibrated: bool, settings: Settings) -> None:
    if calibrated and not settings.calibration:
        raise ValueError("calibrated scores and +compensate need --calibration FILE")
    if settings.calibration and not calibrated:
        raise ValueError("--calibration would be ignored: no score of this study uses calibration text")
    for name in {model.name for model in models}:
        if len({model.path for model in models if model.name == name}) > 1:
            raise ValueError(f"two models are named {name}: their results would be mixed up")


def _evaluate_missing(
    folder: Folder,
    model: StudyModel,
    configuration: Configuration,
    *,
    tasks: list[str],
    settings: Settings,
    is_first: bool,
    bar: tqdm,
) -> None:
    """Compute the missing results of one configuration."""
    missing = [task for task in tasks if not folder.file(model.name, configuration, task).is_file()]
    bar.update(len(tasks) - len(missing))
    if not missing:
        return
    with _language_model(model, configuration, settings) as (lm, shape, dtype):
        for task in missing:
            recipe = [str(configuration)] if configuration.recipe else []
            bar.set_description(" ".join([model.name, *recipe, task]))
            path = folder.file(model.name, configuration, task)
            result = evaluate(
                lm,
                task,
                settings.limits,
                data=settings.data,
                samples_to=path.with_suffix(".samples.jsonl") if settings.log_samples else None,
                model=model.name,
                revision=model.revision,
                configuration=configuration.to_dict() | shape,
                dtype=dtype,
                patched=settings.patch,
                backend=settings.backend or "in memory",
            )
            if result is not None and is_first:
                atomic.write_file(path, [result.to_json().encode()])
            bar.update()
        del lm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _language_model(
    model: StudyModel, configuration: Configuration, settings: Settings
) -> Iterator[tuple[object, dict, str]]:
    """The lm-eval model of a configuration, its shape, and its dtype."""
    with contextlib.ExitStack() as stack:
        path = model.path
        loaded: Any
        if settings.backend and configuration.recipe is None:
            loaded, tokenizer = build_empty(read_config(path)), None
        else:
            loaded, tokenizer = _load(model, configuration, settings), AutoTokenizer.from_pretrained(path)
        shape, dtype = _shape(loaded), str(loaded.dtype).removeprefix("torch.")
        if settings.backend is None:
            lm = model_in_memory(loaded, tokenizer)
        else:
            if configuration.recipe:
                path = f"{stack.enter_context(tempfile.TemporaryDirectory(prefix='gluprune-'))}/{model.name}"
                save(loaded, path, tokenizer)
            del loaded
            if settings.dtype != "auto":
                dtype = settings.dtype
            lm = model_by_backend(
                settings.backend,
                path,
                dtype=settings.dtype,
                device=settings.device,
                model_args=settings.model_args,
            )
        yield lm, shape, dtype


def _load(model: StudyModel, configuration: Configuration, settings: Settings) -> Any:
    """Load the model of a configuration, pruned and patched."""
    loaded: Any = _load_dense(model, settings)
    check_head(loaded, f"evaluating {model.name}")
    recipe = configuration.recipe
    if recipe:
        statistics = _statistics(model, recipe, settings) if recipe.needs.calibration else None
        prune(loaded, pruning_ratio=configuration.ratio, **recipe.options(), calibration=statistics)
    return patch_llama(loaded) if settings.patch else loaded


def _load_dense(model: StudyModel, settings: Settings) -> Any:
    return load(model.path, dtype=settings.dtype, **loading_options(settings.device)).eval()


def statistics_file(label: str, batches: Sequence[torch.Tensor], sensitivity: bool) -> Path:
    """Return where the user's cache keeps the statistics of a text, with sensitivities or without."""
    suffix = "-sensitivity" if sensitivity else ""
    return cache_folder() / f"{label}-{digest(batches)}{suffix}-{VERSION}.safetensors"


def _statistics(model: StudyModel, recipe: Recipe, settings: Settings) -> Statistics:
    """The statistics of the dense model, collected once and cached for all ratios and later runs."""
    batches = _batches(model, settings, settings.windows)
    sensitivity = recipe.needs.sensitivity
    path = statistics_file(f"study-{model.name}-{model.revision}-{settings.dtype}", batches, sensitivity)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrate(_load_dense(model, settings), batches, sensitivity=sensitivity).save(path)
    return Statistics.load(path)


def _batches(model: StudyModel, settings: Settings, windows: int) -> list[torch.Tensor]:
    """Return at most so many windows of each calibration text."""
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    return batches_from_text(tokenizer, settings.calibration, windows, CALIBRATION_LENGTH)


def _shape(model) -> dict:
    """Widths and parameters of a model, on the meta device or not."""
    glus = model_glus(model)
    width = sum(glu.intermediate_size for glu in glus) / len(glus)
    return {
        "intermediate_size": round(width),
        "expansion_ratio": round(width / glus[0].hidden_size, 4),
        "parameters": count_parameters(model),
    }
