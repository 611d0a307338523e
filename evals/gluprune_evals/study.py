"""The study: models x configurations x tasks in one folder, which goes on where it was.

A folder holds `study.json`, what all of its results have in common, and a file a result,
`<model>/<configuration>/<task>.json`, which is written as soon as the task ends and has its name only when it is
complete. A result that is there is never made again; a folder refuses results of another kind than its own.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.collect import calibrate
from gluprune.calibration.statistics import VERSION, Statistics
from gluprune.checkpoints.load_save import build_empty, load, read_config, save
from gluprune.demo.smollm2 import cache_folder
from gluprune.io import atomic
from gluprune.models.glu import count_parameters, model_glus
from gluprune.pruning import recipe as recipes
from gluprune.pruning.prune import prune
from gluprune.pruning.scores import CALIBRATED_SCORES, STATIC_SCORES
from gluprune.runtime.patching import patch_llama
from gluprune_evals.harness import Result, evaluate, model_by_backend, model_in_memory, require_lm_eval
from gluprune_evals.tasks import Limits, check_tasks
from gluprune_evals.text import digest

PAPER_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # of arXiv 2512.22671
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 128, 512
COMPENSATED = "+compensate"
_SAMPLED = 1 << 20  # bytes at each end of a weight file that go into its fingerprint


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned: the arguments of `gluprune.prune`. `str` is how it is named: `maw`, `hybrid+compensate`."""

    score: str
    compensate: bool = False

    @classmethod
    def parse(cls, text: str) -> Recipe:
        score, compensate, rest = text.partition(COMPENSATED)
        if rest or score not in (*STATIC_SCORES, *CALIBRATED_SCORES):
            allowed = ", ".join([*STATIC_SCORES, *CALIBRATED_SCORES])
            raise ValueError(f"unknown score {text!r}: allowed are {allowed}, each also with {COMPENSATED} after it")
        return cls(score, bool(compensate))

    def __str__(self) -> str:
        return self.score + COMPENSATED * self.compensate

    @property
    def is_calibrated(self) -> bool:
        return self.compensate or self.score in CALIBRATED_SCORES


@dataclass(frozen=True)
class Configuration:
    """A recipe at a pruning ratio and a multiple of the width; without a recipe the model as it is."""

    recipe: Recipe | None = None
    ratio: float = 0.0
    multiple_of: int = 1

    def __post_init__(self):
        if self.recipe and not 0 < self.ratio < 1:
            raise ValueError(f"pruning ratios must lie between 0 and 1 (both excluded), got {self.ratio}")

    def to_dict(self) -> dict:
        return {"recipe": self.recipe and str(self.recipe), "ratio": self.ratio, "multiple_of": self.multiple_of}

    def __str__(self) -> str:
        if self.recipe is None:
            return "dense"
        return f"{self.recipe}-{self.ratio:g}" + (f"-multiple-of-{self.multiple_of}" if self.multiple_of > 1 else "")


def grid(ratios: Sequence[float], recipes: Sequence[Recipe], multiple_of: int = 1) -> list[Configuration]:
    """Dense first, then every recipe at every ratio."""
    return [Configuration(), *(Configuration(recipe, ratio, multiple_of) for recipe in recipes for ratio in ratios)]


def fingerprint(source: str, config) -> str:
    """What tells one state of a model from another: the Hub's commit, or a digest of a local checkpoint.

    The digest is of the config, and of each weight file's size, beginning and end.
    """
    if getattr(config, "_commit_hash", None):
        return config._commit_hash[:16]
    state = hashlib.sha256()
    for path in sorted(Path(source).glob("*.safetensors")) + [Path(source) / "config.json"]:
        size = path.stat().st_size
        state.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            state.update(file.read(_SAMPLED))
            file.seek(max(0, size - _SAMPLED))
            state.update(file.read(_SAMPLED))
    return state.hexdigest()[:16]


class Folder:
    """The results of a study on the disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def common(self) -> Path:
        return self.path / "study.json"

    def claim(self, settings: dict, pinned: dict) -> None:
        """Write what the results have in common, or check that this folder's have the same.

        Args:
            settings: what all results share.
            pinned: what those share that it concerns, such as the state of a model: added when it is first needed.

        Raises:
            ValueError: it holds another study (names the difference), or something else.
        """
        known = {}
        if self.common.is_file():
            known = json.loads(self.common.read_text(encoding="utf-8"))
        elif any(path.suffix != ".unfinished" for path in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no study")
        merged = settings | pinned | known
        for name, value in (settings | pinned).items():
            if merged[name] != value:
                raise ValueError(
                    f"{self.path} holds a study with {name} {merged[name]!r}, this one has {value!r}: use another folder"
                )
        if merged != known:
            atomic.write_file(self.common, [json.dumps(merged, indent=1).encode() + b"\n"])

    def file(self, model: str, configuration: Configuration, task: str) -> Path:
        return self.path / model / str(configuration) / f"{task}.json"

    def results(self) -> list[Result]:
        """All results, dense first, then by recipe and ratio.

        Raises:
            ValueError: there is no study, or a file that is no result.
        """
        if not self.common.is_file():
            raise ValueError(f"{self.path} holds no study (no {self.common.name})")
        found = []
        for path in sorted(self.path.glob("*/*/*.json")):
            try:
                found.append(Result.from_json(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return sorted(found, key=lambda r: (r.model, r.configuration["recipe"] or "", r.configuration["ratio"]))


@dataclass(frozen=True)
class Source:
    """A model to study: folder or Hub id, the name it has in results, and its fingerprint."""

    path: str
    name: str
    revision: str

    @classmethod
    def find(cls, path: str | Path) -> Source:
        """Raises ValueError: there is no such model."""
        config = read_config(path)
        return cls(str(path), Path(path).name, fingerprint(str(path), config))


@dataclass(frozen=True)
class Settings:
    """What all results of a folder have in common, and how they are made.

    limits, data, dtype: what to run on; calibration, windows: texts for calibrated recipes, and how many windows of
    each;
    patch: with `patch_llama`; backend, model_args: as a checkpoint in an lm-eval backend instead of in memory;
    log_samples: keep requests, answers and generated lengths.
    """

    limits: Limits = field(default_factory=Limits)
    data: Path | None = None
    dtype: str = "auto"
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
            raise ValueError(f"data folder {self.data} is not there")

    def identity(self) -> dict:
        """What two results must share to stand in one table."""
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
        texts = ", ".join(f"text {hashlib.sha256(text.encode()).hexdigest()[:16]}" for text in self.calibration)
        return f"{texts}, {self.windows} windows of {CALIBRATION_LENGTH} tokens"


def _prepared(source: Source, configuration: Configuration, settings: Settings):
    """The loaded model of a configuration."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(source.path, dtype=settings.dtype).to(device).eval()
    if configuration.recipe:
        prune(
            model,
            pruning_ratio=configuration.ratio,
            multiple_of=configuration.multiple_of,
            score=configuration.recipe.score,
            compensate=configuration.recipe.compensate,
            calibration=_statistics(source, configuration.recipe, settings)
            if configuration.recipe.is_calibrated
            else None,
        )
    return patch_llama(model) if settings.patch else model


def statistics_file(label: str, batches: Sequence[torch.Tensor], sensitivity: bool) -> Path:
    """Where the user's cache keeps the statistics of a text, with sensitivities or without."""
    return cache_folder() / f"{label}-{digest(batches)}{'-sensitivity' * sensitivity}-{VERSION}.safetensors"


def _statistics(source: Source, recipe: Recipe, settings: Settings) -> Statistics:
    """What a recipe needs of the dense model, collected once and kept in the user's cache for all ratios and later runs."""
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    batches = batches_from_text(tokenizer, settings.calibration, settings.windows, CALIBRATION_LENGTH)
    sensitivity = recipes.Recipe(recipe.score).needs.sensitivity
    path = statistics_file(f"study-{source.name}-{source.revision}-{settings.dtype}", batches, sensitivity)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrate(load(source.path, dtype=settings.dtype).eval(), batches, sensitivity=sensitivity).save(path)
    return Statistics.load(path)


def _shape(model: torch.nn.Module) -> dict:
    """Widths and parameters of a model, on the meta device or not."""
    glus = model_glus(model)
    width = sum(glu.intermediate_size for glu in glus) / len(glus)
    return {
        "intermediate_size": round(width),
        "expansion_ratio": round(width / glus[0].hidden_size, 4),
        "parameters": count_parameters(model),
    }


@contextlib.contextmanager
def _language_model(
    source: Source, configuration: Configuration, settings: Settings
) -> Iterator[tuple[object, dict, str]]:
    """The lm-eval model of a configuration, its shape, and its dtype."""
    with contextlib.ExitStack() as stack:
        path = source.path
        if settings.backend and configuration.recipe is None:
            model = build_empty(read_config(path))
        else:
            model = _prepared(source, configuration, settings)
            tokenizer = AutoTokenizer.from_pretrained(path)
        shape, dtype = _shape(model), str(model.dtype).removeprefix("torch.")
        if settings.backend is None:
            lm = model_in_memory(model, tokenizer)
        else:
            if configuration.recipe:
                path = f"{stack.enter_context(tempfile.TemporaryDirectory(prefix='gluprune-'))}/{source.name}"
                save(model, path, tokenizer)
            del model
            if settings.dtype != "auto":
                dtype = settings.dtype
            lm = model_by_backend(settings.backend, path, settings.dtype, settings.model_args)
        yield lm, shape, dtype


def run(
    folder: Folder,
    sources: Sequence[Source],
    configurations: Sequence[Configuration],
    tasks: Sequence[str],
    settings: Settings,
) -> list[Result]:
    """Make every result that the folder does not hold yet. A run that was killed goes on where it was.

    Several processes may work on one folder, on a GPU each: each takes the configurations that no other is at.

    Returns:
        All results of the folder.

    Raises:
        ValueError: the folder holds another study, or the input is not right; nothing is evaluated.
        RuntimeError, OSError: data that cannot be had, a full disk; finished results stay.
    """
    require_lm_eval()
    tasks = check_tasks(tasks)
    calibrated = any(c.recipe and c.recipe.is_calibrated for c in configurations)
    if calibrated and not settings.calibration:
        raise ValueError("calibrated scores and +compensate need --calibration FILE")
    for name in {source.name for source in sources}:
        if len({source.path for source in sources if source.name == name}) > 1:
            raise ValueError(f"two models are named {name}: results would mix")
    is_first = int(os.environ.get("RANK", "0")) == 0  # accelerate and torchrun start a process a rank
    if is_first:
        folder.path.mkdir(parents=True, exist_ok=True)
        with atomic.locked(folder.path):
            pinned = {f"revision of {source.name}": source.revision for source in sources}
            if calibrated:
                pinned["calibration"] = settings.calibration_identity()
            folder.claim(settings.identity(), pinned)
    pairs = [(source, configuration) for source in sources for configuration in configurations]
    with tqdm(total=len(pairs) * len(tasks), unit="task", desc="study") as progress:
        for source, configuration in pairs:
            with contextlib.ExitStack() as stack:
                if is_first:
                    place = folder.file(source.name, configuration, "").parent
                    place.mkdir(parents=True, exist_ok=True)
                    try:
                        stack.enter_context(atomic.locked(place))
                    except ValueError:  # another process is at it: leave it this one
                        progress.update(len(tasks))
                        continue
                _fill(folder, source, configuration, tasks, settings, is_first, progress)
    return folder.results() if is_first else []


def _fill(
    folder: Folder,
    source: Source,
    configuration: Configuration,
    tasks: list[str],
    settings: Settings,
    is_first: bool,
    progress: tqdm,
) -> None:
    """Make the results of one configuration that are missing."""
    missing = [task for task in tasks if not folder.file(source.name, configuration, task).is_file()]
    progress.update(len(tasks) - len(missing))
    if not missing:
        return
    with _language_model(source, configuration, settings) as (lm, shape, dtype):
        for task in missing:
            progress.set_description(f"{source.name} {configuration} {task}")
            path = folder.file(source.name, configuration, task)
            result = evaluate(
                lm,
                task,
                settings.limits,
                data=settings.data,
                samples_to=path.with_suffix(".samples.jsonl") if settings.log_samples else None,
                model=source.name,
                revision=source.revision,
                configuration=configuration.to_dict() | shape,
                dtype=dtype,
                patched=settings.patch,
                backend=settings.backend or "in memory",
            )
            if is_first:
                atomic.write_file(path, [result.to_json().encode()])
            progress.update()
        del lm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
