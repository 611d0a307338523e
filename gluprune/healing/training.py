"""Training of a student by transformers' `Trainer`: what is trained on in which order, checkpoints, progress."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import Filter, LogRecord
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from gluprune.healing.student import answer
from gluprune.io.progress import progress
from gluprune.models.glu import decoder_layers

_SAVES = 10  # checkpoints of one training
_WARMUP = 0.05  # of all steps


@dataclass(frozen=True)
class Settings:
    """How a student is trained.

    Attributes:
        train: What is trained: "all", "mlp" or "lora"; see `gluprune.healing.student.as_student`.
        tokens: On how many tokens, about; texts that have fewer are repeated.
        length: Tokens per window.
        batch: Windows per step, over all processes.
        device_batch: Windows that a process runs at a time, at most.
        learning_rate: At its peak: it rises over the first steps, and falls to 0 along a cosine.
        hidden_weight: Factor of the error of the hidden states. 0: it is not computed.
    """

    train: str = "all"
    tokens: int = 1_000_000
    length: int = 512
    batch: int = 16
    device_batch: int = 4
    learning_rate: float = 1e-4
    hidden_weight: float = 0.0

    @property
    def steps(self) -> int:
        """Number of steps."""
        return max(1, round(self.tokens / (self.batch * self.length)))

    def division(self, processes: int) -> tuple[int, int]:
        """Return how many windows a process runs at a time, and how many times per step.

        Raises:
            ValueError: The windows of a step cannot be divided evenly among the processes.
        """
        if self.batch % processes:
            raise ValueError(f"batch={self.batch} windows cannot be divided evenly among {processes} processes")
        own = self.batch // processes
        at_once = max(n for n in range(1, min(own, self.device_batch) + 1) if own % n == 0)
        return at_once, own // at_once


class Windows(torch.utils.data.Dataset):
    """All windows that are trained on, in order: every pass over the text has its own random order.

    Args:
        windows: Token ids `[N, length]`.
        count: How many are trained on.
    """

    def __init__(self, windows: torch.Tensor, count: int):
        generator = torch.Generator().manual_seed(0)
        passes = -(-count // len(windows))
        self._order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(passes)])[:count]
        self._windows = windows

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._windows[self._order[index]]}


class _Distiller(Trainer):
    """A `Trainer` whose loss compares the student with a teacher."""

    def __init__(self, teacher: PreTrainedModel, hidden_states: bool, **options: Any):
        super().__init__(**options)
        self._teacher, self._hidden_states = teacher, hidden_states

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss of a batch. All windows have the same length, so that means can be averaged."""
        ids = inputs["input_ids"]
        return model(input_ids=ids, answer=answer(self._teacher, ids, self._hidden_states))["loss"]


class _Progress(TrainerCallback):
    """A progress bar with the loss, in one process."""

    def __init__(self, tokens_per_step: int):
        self._tokens, self._bar = tokens_per_step, None

    def on_train_begin(self, args, state, control, **_):
        """Show the bar, from the step where training continues."""
        if state.is_world_process_zero:
            total, start = (steps * self._tokens for steps in (state.max_steps, state.global_step))
            self._bar = progress(total=total, initial=start, desc="healing", unit="token", unit_scale=True)

    def on_log(self, args, state, control, logs=None, **_):
        """Advance the bar by one step."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)
            self._bar.update(self._tokens)

    def on_train_end(self, args, state, control, **_):
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


class _FiniteLoss(TrainerCallback):
    """Stops a training whose loss is NaN or infinite, before the weights replace the last checkpoint."""

    def on_log(self, args, state, control, logs=None, **_):
        """Check the loss of a step, which is that of all processes."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss} at step {state.global_step} of {state.max_steps}: use a lower learning_rate"
                f" than {args.learning_rate}"
            )


def arguments(folder: Path, settings: Settings, *, processes: int, device: str, bf16: bool) -> TrainingArguments:
    """Return the arguments of the `Trainer`.

    Args:
        folder: For its checkpoints.
        settings: How the student is trained.
        processes: How many train together.
        device: Type of the device.
        bf16: Whether the student computes in bfloat16.
    """
    at_once, times = settings.division(processes)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=times,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(_WARMUP * settings.steps),  # the first of them has a learning rate of 0
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=device == "cpu",
        train_sampling_strategy="sequential",  # `Windows` has the order
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=-(-settings.steps // _SAVES),
        save_total_limit=1,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        report_to="none",
        seed=0,
    )


def train(
    student: Any, teacher: PreTrainedModel, windows: torch.Tensor, *, settings: Settings, options: TrainingArguments
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a student, from the last complete checkpoint if there is one.

    Args:
        student: From `as_student`.
        teacher: A causal LM in the dtype to compute in.
        windows: Token ids `[N, length]`.
        settings: How it is trained.
        options: From `arguments`.

    Returns:
        The loss of every step, and the student's state dict on the CPU: complete in the first process, and perhaps
        empty in others.

    Raises:
        RuntimeError: A loss is NaN or infinite.
    """
    trainer = _Distiller(
        teacher,
        settings.hidden_weight > 0,
        model=student,
        args=options,
        train_dataset=Windows(windows, settings.steps * settings.batch),
        callbacks=[_FiniteLoss(), _Progress(settings.batch * settings.length)],
    )
    trainer.remove_callback(PrinterCallback)
    teacher.to(options.device).requires_grad_(False)  # type: ignore[arg-type]
    if getattr(trainer.accelerator, "is_fsdp2", False):
        _shard(teacher)
    with _quiet():
        trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(options.output_dir)), options.should_save))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return losses, {name: tensor.cpu() for name, tensor in state.items()}


def last_checkpoint(folder: Path, remove: bool = False) -> str | None:
    """Return the last complete checkpoint of an interrupted training, or None.

    The `Trainer` writes `trainer_state.json` last, and removes the checkpoint before only then.

    Args:
        folder: Where the `Trainer` writes.
        remove: Whether to remove incomplete ones.
    """
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_bytes())
            found[int(path.name.rpartition("-")[2])] = path
        except (OSError, ValueError):
            if remove:
                shutil.rmtree(path)
    return str(found[max(found)]) if found else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what transformers prints: bars that would break the one of the training, and that tied weights are missing.

    Of tied weights, its checkpoints have one, and the model has both after loading it.
    """
    shown, logger = logging.is_progress_bar_enabled(), logging.get_logger("transformers.trainer")
    logging.disable_progress_bar()
    tied = _TiedWeights()
    logger.addFilter(tied)
    try:
        yield
    finally:
        logger.removeFilter(tied)
        if shown:
            logging.enable_progress_bar()


class _TiedWeights(Filter):
    def filter(self, record: LogRecord) -> bool:
        return not record.getMessage().startswith("There were missing keys in the checkpoint")


def _shard(teacher: PreTrainedModel) -> None:
    """Divide the decoder layers of a teacher among the processes, as FSDP2 does with the student."""
    from torch.distributed.fsdp import fully_shard

    for layer in decoder_layers(teacher):
        fully_shard(layer, reshard_after_forward=True)  # by default not, since no other module is sharded
