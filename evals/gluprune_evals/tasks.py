"""The tasks of the study: lm-eval's official definitions, using the Hub's data or local files with the same content.

A local folder replaces only the source of the documents: prompts, shots, filters and metrics are those of lm-eval. Its
layout is `FILES`; every file is JSON Lines with the fields of the Hub's data set, gzipped where the name ends in `.gz`.
For ifeval the folder also holds NLTK's `punkt_tab` tables under `nltk_data`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

FRAGILE, ROBUST, OTHER = "fragile", "robust", "other"  # the groups of arXiv 2512.22671


@dataclass(frozen=True)
class TaskSpec:
    """One task of the study.

    Attributes:
        folder: Folder of lm-eval's `tasks` that defines it.
        leaves: The lm-eval tasks that it consists of; "*" for all in the folder.
        metric: The reported figure, as lm-eval names it with its filter.
        group: Its behaviour in the published study.
        documents: Number of documents of each leaf in `--budget small`.
        shots: None: lm-eval's own number.
        chance: The score of random guessing, if known.
        subjects: Number of leaves in `--budget small`. None: all.
    """

    folder: str
    leaves: tuple[str, ...]
    metric: str
    group: str
    documents: int
    shots: int | None = None
    chance: float | None = None
    subjects: int | None = None

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a perplexity."""
        return "perplexity" in self.metric


TASKS = {
    "wikitext": TaskSpec("wikitext", ("wikitext",), "word_perplexity,none", FRAGILE, 3),
    "lambada_openai": TaskSpec("lambada", ("lambada_openai",), "perplexity,none", FRAGILE, 64),
    "mmlu": TaskSpec("mmlu/default", ("*",), "acc,none", FRAGILE, 6, shots=5, chance=0.25, subjects=6),
    "gsm8k": TaskSpec("gsm8k", ("gsm8k",), "exact_match,flexible-extract", FRAGILE, 4, shots=5),
    "ifeval": TaskSpec("ifeval", ("ifeval",), "prompt_level_strict_acc,none", ROBUST, 12),
    "leaderboard_musr": TaskSpec(
        "leaderboard/musr",
        tuple(f"leaderboard_musr_{name}" for name in ("murder_mysteries", "object_placements", "team_allocation")),
        "acc_norm,none",
        ROBUST,
        4,
    ),
    "truthfulqa_mc1": TaskSpec("truthfulqa", ("truthfulqa_mc1",), "acc,none", ROBUST, 32),
    "truthfulqa_mc2": TaskSpec("truthfulqa", ("truthfulqa_mc2",), "acc,none", ROBUST, 32),
    "boolq": TaskSpec("super_glue/boolq", ("boolq",), "acc,none", OTHER, 24, chance=0.5),
    "arc_challenge": TaskSpec("arc", ("arc_challenge",), "acc_norm,none", OTHER, 64, chance=0.25),
    "hellaswag": TaskSpec("hellaswag", ("hellaswag",), "acc_norm,none", OTHER, 32, chance=0.25),
    "winogrande": TaskSpec("winogrande", ("winogrande",), "acc,none", OTHER, 64, chance=0.5),
    "piqa": TaskSpec("piqa", ("piqa",), "acc_norm,none", OTHER, 64, chance=0.5),
}
BASE_TASKS = tuple(TASKS)
INSTRUCT_TASKS = (
    *("leaderboard_musr", "truthfulqa_mc1", "truthfulqa_mc2", "lambada_openai", "mmlu", "gsm8k", "ifeval"),
)
SEED = 0

# lm-eval task -> split -> file below the local folder, and the fields that every line must have.
FILES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "wikitext": ({"test": "wikitext/test.jsonl"}, ("page",)),
    "lambada_openai": ({"test": "lambada_openai/test.jsonl"}, ("text",)),
    "gsm8k": ({"test": "gsm8k/test.jsonl", "train": "gsm8k/train.jsonl"}, ("question", "answer")),
    "ifeval": ({"train": "ifeval/train.jsonl"}, ("key", "prompt", "instruction_id_list", "kwargs")),
    "truthfulqa_mc1": ({"validation": "truthfulqa/validation.jsonl"}, ("question", "mc1_targets")),
    "truthfulqa_mc2": ({"validation": "truthfulqa/validation.jsonl"}, ("question", "mc2_targets")),
    "boolq": ({"validation": "boolq/validation.jsonl"}, ("question", "passage", "label")),
    "arc_challenge": ({"test": "arc_challenge/test.jsonl"}, ("question", "choices", "answerKey")),
    "hellaswag": (
        {"validation": "hellaswag/validation.jsonl.gz"},
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": ({"validation": "winogrande/validation.jsonl"}, ("sentence", "option1", "option2", "answer")),
    "piqa": ({"validation": "piqa/validation.jsonl"}, ("goal", "sol1", "sol2", "label")),
    "leaderboard_musr_murder_mysteries": (
        {"murder_mysteries": "musr/murder_mysteries.jsonl"},
        ("narrative", "question", "choices", "answer_index", "answer_choice"),
    ),
}
MMLU_FIELDS = ("question", "choices", "answer")


@dataclass(frozen=True)
class Limits:
    """Which documents are run, and how much may be generated: part of the identity of a result.

    Attributes:
        documents: At most this many of each leaf. None: the small budget's number, or all.
        small: The subset of `--budget small`: `TaskSpec.documents` and `subjects`, generation capped at `small_tokens`.

    Raises:
        ValueError: `documents` is below 1, or given together with `small`.
    """

    documents: int | None = None
    small: bool = False

    small_tokens = 128

    def __post_init__(self):
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"limit must be at least 1, got {self.documents}")
        if self.documents is not None and self.small:
            raise ValueError("give --limit or --budget, not both")

    def __str__(self) -> str:
        return "budget small" if self.small else f"limit {self.documents}" if self.documents else "all documents"

    def subset(self) -> str:
        """Return a digest of this choice of documents, since another version may choose differently."""
        chosen = [SEED, self.documents]
        if self.small:
            chosen += [self.small_tokens, *((name, spec.documents, spec.subjects) for name, spec in TASKS.items())]
        return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:12]

    def leaves(self, spec: TaskSpec, names: list[str]) -> list[str]:
        """Return the leaves to run: all, or a seeded choice of the small budget's number of them."""
        if not self.small or spec.subjects is None or spec.subjects >= len(names):
            return names
        return sorted(random.Random(SEED).sample(names, spec.subjects))

    def samples(self, spec: TaskSpec, available: int) -> list[int]:
        """Return ascending indices of the documents to run, a seeded choice for the number available."""
        wanted = spec.documents if self.small else self.documents
        if wanted is None or wanted >= available:
            return list(range(available))
        return sorted(random.Random(SEED).sample(range(available), wanted))


def check_tasks(names: Iterable[str]) -> list[str]:
    """Return the names in the order of `TASKS`.

    Raises:
        ValueError: A name is not a task of the study.
    """
    names = list(names)
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; allowed: {', '.join(TASKS)}")
    return [name for name in TASKS if name in names]


def read_jsonl(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """Read a JSON Lines file, gzipped if its name ends in `.gz`.

    Raises:
        ValueError: The file is missing, a line is not a JSON object or lacks a field; the message names them.
    """
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                missing = [field for field in fields if field not in row]
                if missing:
                    raise ValueError(f"{path}, line {number} has no field {missing[0]!r}")
                rows.append(row)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, TypeError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, line {len(rows) + 1} is not a JSON object: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def local_files(leaf: str, folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return the files of one lm-eval task by split, and the fields they must have."""
    if leaf.startswith("mmlu_"):
        subject = leaf.removeprefix("mmlu_")
        names, fields = {split: f"mmlu/{split}/{subject}.jsonl" for split in ("test", "dev")}, MMLU_FIELDS
    else:
        names, fields = FILES[leaf]
    return {split: folder / name for split, name in names.items()}, fields


def check_data(names: Iterable[str], folder: Path) -> None:
    """Check the files in a local folder that some tasks need.

    Raises:
        ValueError: A file is missing, a line is not a JSON object or lacks a field; the message names them.
    """
    for name in names:
        if name == "mmlu":  # one file per subject; which are needed depends on the limits
            for split in ("test", "dev"):
                if not (folder / "mmlu" / split).is_dir():
                    raise ValueError(f"{folder / 'mmlu' / split} does not exist")
            continue
        for leaf in TASKS[name].leaves:
            if leaf in FILES:
                paths, fields = local_files(leaf, folder)
                for path in paths.values():
                    read_jsonl(path, fields)


def local_source(leaf: str, folder: Path) -> Callable[..., dict]:
    """Return a replacement for `datasets.load_dataset` that reads local files: split -> Dataset."""
    import datasets

    paths, fields = local_files(leaf, folder)
    rows = {split: read_jsonl(path, fields) for split, path in paths.items()}

    def load(**_) -> dict[str, datasets.Dataset]:
        return {split: datasets.Dataset.from_list(lines) for split, lines in rows.items()}

    return load


def build(name: str, limits: Limits, data: Path | None = None) -> dict:
    """Return the lm-eval tasks that a task of the study consists of.

    Args:
        name: One of `TASKS`.
        limits: Chooses among the leaves.
        data: A local folder. None: the Hub's data. MuSR's object placements and team allocation are not part of such a
            folder (only samples of them are freely available), so MuSR then has only murder mysteries.

    Returns:
        lm-eval task name -> lm-eval `Task`.

    Raises:
        ValueError: A local file is missing or lacks a field.
        RuntimeError: The Hub's data is not available.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    spec = TASKS[name]
    root = Path(lm_eval.__file__).parent / "tasks" / spec.folder
    manager = TaskManager(include_defaults=False, include_path=str(root))
    leaves = [leaf for leaf in manager.all_subtasks if spec.leaves == ("*",) or leaf in spec.leaves]
    if data is not None:
        leaves = [leaf for leaf in leaves if leaf.startswith("mmlu_") or leaf in FILES]
    leaves = limits.leaves(spec, leaves)
    if data is not None and name == "ifeval":
        os.environ["NLTK_DATA"] = str(data / "nltk_data")  # read by nltk when ifeval's checkers import it
    overrides = {leaf: {} if data is None else _local_overrides(manager, leaf, data) for leaf in leaves}
    try:
        group = {"group": name, "task": [{"task": leaf, **overrides[leaf]} for leaf in leaves]}
        found = manager.load(group)["tasks"]
    except (OSError, ConnectionError) as error:
        raise RuntimeError(
            f"the data of {name} cannot be read from the Hub ({_first_line(error)}): give local files with --data"
        ) from error
    return {leaf: found[leaf] for leaf in leaves}


def _local_overrides(manager, leaf: str, data: Path) -> dict:
    from lm_eval.tasks._yaml_loader import load_yaml

    paths, _ = local_files(leaf, data)
    config = load_yaml(manager.task_index[leaf].yaml_path, resolve_func=False)
    # Splits that the task names but no score needs would be read when the task is built.
    names = ("training_split", "validation_split", "test_split", "fewshot_split")
    absent = {split: None for split in names if config.get(split) is not None and config[split] not in paths}
    return {"custom_dataset": local_source(leaf, data), **absent}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
