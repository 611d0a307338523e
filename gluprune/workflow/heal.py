"""`heal`: trains a pruned checkpoint by distillation from the dense one, measures what it gains, and writes the result.

Runs in one process or in several, which `accelerate launch` or `torchrun` starts: all train, the first one does the
rest. Every stage leaves its result in the work folder next to the output (`gluprune.io.folder.complete_folder`), where
the same call continues after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer, PreTrainedConfig

from gluprune.checkpoints.load_save import build_empty, read_config
from gluprune.healing.memory import training_memory
from gluprune.healing.student import check_trained
from gluprune.healing.training import Settings, arguments
from gluprune.io.folder import check_destination, check_outside, complete_folder, folder_state
from gluprune.io.hub import local_folder
from gluprune.io.progress import RESUMED
from gluprune.models.device import AUTO, choose_device, dtype_name
from gluprune.models.glu import check_head
from gluprune.models.widths import layer_widths
from gluprune.pruning.history import versions
from gluprune.workflow.healing_work import HealingWork
from gluprune.workflow.report import HealReport
from gluprune.workflow.texts import GivenTexts, check_lengths

logger = logging.getLogger(__name__)

_DEVICES, _DTYPES = (AUTO, "cpu", "cuda"), (AUTO, "float32", "bfloat16")
_TIMEOUT = timedelta(days=1)  # while the first process writes text or measures, the others wait


def heal(
    pruned: str | Path,
    teacher: str | Path,
    destination: str | Path,
    *,
    text: str | Path | Sequence[str | Path] = (),
    test_text: str | Path | Sequence[str | Path] = (),
    fields: str | Sequence[str] = "text",
    own_windows: int = 64,
    tokens: int = 1_000_000,
    length: int = 512,
    batch: int = 16,
    device_batch: int = 4,
    learning_rate: float = 1e-4,
    train: str = "all",
    hidden_weight: float = 0.0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> HealReport | None:
    """Train a pruned checkpoint to predict what the dense model predicts, and write the result.

    The loss is the forward KL divergence of the next-token distributions, as in *Compact Language Models via Pruning
    and Knowledge Distillation* (Minitron; Muralidharan et al., arXiv 2407.14679). The checkpoint keeps its format, its
    widths, and the dtype of its weights; while they are trained, they are in float32. Perplexity before and after is
    measured on text that is held apart, and written to `gluprune.json` and the model card.

    After an interruption, the same call continues: checkpoints of the training lie in a hidden folder next to the
    destination. In one process on a CPU, the files written are the same, byte for byte.

    Args:
        pruned: The student: a folder or a Hub id. It is never written to.
        teacher: The dense model: a folder or a Hub id, with the same tokenizer.
        destination: A folder that does not exist or is empty, outside both models. With several hosts, all of them must
            share it.
        text: A file of text to train on, or several, as `gluprune.io.text.read_text` reads them. If none are given:
            `wikipedia`.
        test_text: A file of text to measure perplexity on, or several. If none are given, the last tenth of each
            text to train on is held apart.
        fields: The field that holds the text in JSON files, or several.
        own_windows: Number of windows that the teacher writes. 0: none.
        tokens: On how many tokens to train, rounded to whole steps; texts that have fewer are repeated.
        length: Tokens per window.
        batch: Windows per step, over all processes.
        device_batch: Windows that a process runs at a time, at most: fewer need less memory.
        learning_rate: At its peak. It rises over the first 5 % of the steps, and falls to 0 along a cosine.
        train: "all": the decoder and the head; "mlp": the MLPs and all norms; "lora": low-rank updates of the linear
            layers of the decoder, which are added to the weights in the end (needs peft).
        hidden_weight: Factor of a second term of the loss, the relative error of the hidden states of all layers; the
            teacher must have the same hidden size and number of layers. 0: only the divergence.
        device: Where the models run: "cpu" or "cuda"; "auto" is cuda if available, otherwise cpu.
        dtype: Dtype that both models compute in: "float32" or "bfloat16"; "auto" is float32 on a CPU and otherwise
            bfloat16.

    Returns:
        A `HealReport`, which `print` shows as a table; None in processes other than the first.

    Raises:
        ValueError: Bad arguments, too little text, or models that do not belong together.
        ImportError: `train="lora"` without peft.
        RuntimeError: The loss is not finite.
        OSError: A file cannot be read or written.

    Example:
        >>> import gluprune
        >>> _ = (folder / "notes.txt").write_text("A long text. " * 200)
        >>> report = gluprune.prune_checkpoint(model_path, folder / "pruned", pruning_ratio=0.25)
        >>> data = {"text": [folder / "notes.txt"], "own_windows": 0, "tokens": 512, "length": 32}
        >>> report = gluprune.heal(folder / "pruned", model_path, folder / "healed", **data)
        >>> len(report.losses)
        1
    """
    settings = Settings(train, tokens, length, batch, device_batch, learning_rate, hidden_weight)
    _check_numbers(settings, own_windows)
    check_trained(train)
    device, dtype = str(device), dtype_name(dtype)
    check_place(device, dtype)
    texts = GivenTexts.read(text, test_text, fields)
    return heal_on(texts, pruned, teacher, destination, settings, own_windows=own_windows, device=device, dtype=dtype)


def heal_on(
    texts: GivenTexts,
    pruned: str | Path,
    teacher: str | Path,
    destination: str | Path,
    settings: Settings,
    *,
    own_windows: int,
    device: str,
    dtype: str,
) -> HealReport | None:
    """Do what `heal` does, on texts that have been read."""
    kind = choose_device(device).type
    check_destination(destination)
    folder, dense = local_folder(pruned), local_folder(teacher)
    check_outside(destination, folder, dense)
    configs = read_config(folder), read_config(dense)
    _check_pair(folder, dense, *configs, settings)
    check_lengths(texts, AutoTokenizer.from_pretrained(folder), settings.length)
    processes = PartialState(cpu=kind == "cpu", timeout=_TIMEOUT)
    at_once = settings.division(processes.num_processes)[0]
    bf16 = dtype == "bfloat16" or (dtype == AUTO and kind != "cpu")
    sharded = processes.num_processes if _is_sharded() else 1
    memory = training_memory(*configs, settings, windows=at_once, bf16=bf16, sharded=sharded)
    key = _key((folder, dense), texts, asdict(settings), own_windows, kind, bf16, processes.num_processes)
    with _shared_folder(processes, destination, key) as output:
        work = HealingWork(
            output.parent,
            (folder, dense),
            texts=texts,
            own_windows=own_windows,
            settings=settings,
            options=arguments(
                output.parent / "training", settings, processes=processes.num_processes, device=kind, bf16=bf16
            ),
        )
        if work.is_resumed:
            work.announce(RESUMED)
        does = "the teacher writes text" if own_windows else "read the text"
        work.announce(f"1 of 4: {does}; left: measure, train, write. Memory: {memory}")
        return _run(work, output, str(destination), memory.total)


def _run(work: HealingWork, output: Path, destination: str, memory: int) -> HealReport | None:
    """Run all stages; the first process returns the report."""
    texts = work.texts
    work.announce("2 of 4: measure the dense and the pruned model; left: train, write")
    before = work.perplexities()
    work.announce(f"3 of 4: train on {work.trained_tokens:,} tokens; left: write")
    losses, state = work.train()
    if not work.is_first:
        return None
    work.announce("4 of 4: write and measure")
    healed = work.write(output, losses, state)
    return HealReport(
        folder=destination,
        train=work.settings.train,
        tokens=work.trained_tokens,
        losses=losses,
        dense=before["dense"],
        pruned=before["pruned"],
        healed=healed,
        texts=list(texts.test),
        test_tokens=work.held_apart.tokens,
        length=work.settings.length,
        memory=memory,
    )


def check_place(device: str, dtype: str) -> None:
    """Check the names of the device and of the dtype that models are trained on and in.

    Raises:
        ValueError: One of them is unknown.
    """
    for name, value, allowed in (("device", device, _DEVICES), ("dtype", dtype, _DTYPES)):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r} for training; allowed: {', '.join(allowed)}")


def _check_numbers(settings: Settings, own_windows: int) -> None:
    if own_windows < 0:
        raise ValueError(f"own_windows must be at least 0, got {own_windows}")
    for name in ("tokens", "length", "batch", "device_batch"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if not 0 < settings.learning_rate < 1:
        raise ValueError(f"learning_rate must lie between 0 and 1 (both excluded), got {settings.learning_rate}")
    if not 0 <= settings.hidden_weight < float("inf"):
        raise ValueError(f"hidden_weight must be at least 0 and finite, got {settings.hidden_weight}")


def _check_pair(
    folder: Path, dense: Path, config: PreTrainedConfig, teacher: PreTrainedConfig, settings: Settings
) -> None:
    """Check that a student can learn from a teacher, from their configs and tokenizers."""
    if folder.resolve() == dense.resolve():
        raise ValueError(f"pruned and teacher are the same model, {folder}: the teacher is the model before pruning")
    models = [build_empty(config), build_empty(teacher)]
    for model in models:
        check_head(model, "healing")
    student_text, teacher_text = config.get_text_config(), teacher.get_text_config()
    shapes = [(text.model_type, text.num_hidden_layers, text.hidden_size) for text in (student_text, teacher_text)]
    widths = zip(layer_widths(config), layer_widths(teacher), strict=shapes[0] == shapes[1])
    wider = next(((layer, *pair) for layer, pair in enumerate(widths) if pair[0] > pair[1]), None)
    if shapes[0] == shapes[1] and wider:
        raise ValueError(
            f"layer {wider[0]} has {wider[1]} neurons in pruned, {wider[2]} in teacher: give the pruned model first and"
            " the dense model as teacher"
        )
    heads: list[Any] = [model.get_output_embeddings() for model in models]
    rows = [len(head.weight) for head in heads]
    if rows[0] != rows[1]:
        raise ValueError(f"pruned and teacher must predict the same tokens: pruned has {rows[0]}, teacher {rows[1]}")
    if AutoTokenizer.from_pretrained(folder).get_vocab() != AutoTokenizer.from_pretrained(dense).get_vocab():
        raise ValueError(f"the tokenizers of {folder} and {dense} differ: the teacher must read the same tokens")
    if settings.hidden_weight and shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"hidden_weight={settings.hidden_weight} compares hidden states: pruned has {shapes[0][1]} layers of size"
            f" {shapes[0][2]}, teacher {shapes[1][1]} of {shapes[1][2]}"
        )
    if shapes[0] != shapes[1]:
        found, wanted = ("{} with {} layers of size {}".format(*shape) for shape in reversed(shapes))
        logger.warning("the teacher is not the dense model: it is %s, the pruned model is %s", found, wanted)


def _is_sharded() -> bool:
    """Whether `accelerate launch` was asked to divide the weights among the processes."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(name, "false").lower() == "true" for name in names)


def _key(folders: Sequence[Path], texts: GivenTexts, *others: object) -> str:
    """Return a digest that changes with the models, the texts, the settings, the versions and the processes."""
    states = [folder_state(folder) for folder in folders]
    task = [states, list(texts.calibration), list(texts.test), texts.digests, others, _is_sharded(), versions()]
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _shared_folder(processes: PartialState, destination: str | Path, key: str) -> Iterator[Path]:
    """Yield the same folder in all processes; the first one creates it and gives it the destination's name."""
    if processes.is_main_process:
        with complete_folder(destination, key, resume=True, in_stages=True) as output:
            broadcast_object_list([str(output)])
            yield output
    else:
        received = [""]
        broadcast_object_list(received)
        yield Path(received[0])
