"""How much memory a training takes, computed from shapes before any weight is loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from gluprune.checkpoints.load_save import build_empty
from gluprune.healing.loss import chunk_tokens
from gluprune.healing.student import as_student, decoded
from gluprune.healing.training import Settings
from gluprune.models.glu import count_parameters
from gluprune.models.widths import layer_widths, set_config_widths

# Float32 tensors `[tokens, V]` that exist at once: logits and logarithms of both models, the gradient of each.
_LOGITS = 6


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes per process at the peak of a training.

    Attributes:
        student: Weights, in float32.
        optimizer: Gradients and both moments of what is trained, and as much as one of them while weights change.
        teacher: Weights.
        activations: What is kept for the backward pass.
        head: Logits of some tokens, and the gradient of the head.
    """

    student: int
    optimizer: int
    teacher: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.student + self.optimizer + self.teacher + self.activations + self.head

    def __str__(self) -> str:
        def shown(value: int) -> str:
            return f"{value / 1e9:.1f} GB"

        parts = f"student {shown(self.student)}, gradients and optimizer {shown(self.optimizer)}, teacher"
        rest = f"{shown(self.teacher)}, activations {shown(self.activations)}, head {shown(self.head)}"
        return f"about {shown(self.total)} per process: {parts} {rest}"


def training_memory(
    config: PreTrainedConfig, teacher: PreTrainedConfig, settings: Settings, *, windows: int, bf16: bool, sharded: int
) -> TrainingMemory:
    """Return about how much memory a training takes.

    Args:
        config: Of the student.
        teacher: Config of the teacher.
        settings: How the student is trained.
        windows: How many a process runs at a time.
        bf16: Whether both compute in bfloat16.
        sharded: Among how many processes weights and optimizer are divided.
    """
    student = as_student(build_empty(config), settings.train)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    head = student.get_output_embeddings().weight
    vocabulary = len(head)
    logits = 4 * vocabulary * min(chunk_tokens(vocabulary), windows * settings.length)
    return TrainingMemory(
        student=4 * count_parameters(student) // sharded,
        optimizer=16 * trained // sharded,
        teacher=(2 if bf16 else 4) * count_parameters(build_empty(teacher)) // sharded,
        activations=_activations(config, settings, windows, bf16),
        head=_LOGITS * logits + (4 * head.numel() if head.requires_grad else 0),
    )


def _activations(config: PreTrainedConfig, settings: Settings, windows: int, bf16: bool) -> int:
    """Return the bytes of what a forward keeps for the backward pass. It runs on tensors that take no memory."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    config = copy.deepcopy(config)
    config.dtype = torch.float32
    widths = layer_widths(config)  # which differ in size, not in sum: weights without memory cannot be resized
    set_config_widths(config.get_text_config(), [-(-sum(widths) // len(widths))] * len(widths))
    # Adapters keep the inputs of the layers that they update, as training these layers does.
    train = "all" if settings.train == "lora" else settings.train
    with FakeTensorMode(), no_init_weights():  # some initialisations read values, which these tensors do not have
        student = as_student(build_empty(config, "cpu").train(), train, settings.hidden_weight)
        ids = torch.zeros(windows, settings.length, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            decoded(student, ids, settings.hidden_weight > 0)
        weights = {parameter.untyped_storage()._cdata for parameter in student.parameters()}
        return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
