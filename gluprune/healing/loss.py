"""The loss of healing: how far a student's predictions, and if wanted its hidden states, are from its teacher's.

The divergence of a token is the forward KL of its next-token distributions,

    KL(p || q) = sum over v of p(v) * (log p(v) - log q(v)),

with p the teacher's and q the student's, as in *Compact Language Models via Pruning and Knowledge Distillation*
(Minitron; Muralidharan et al., arXiv 2407.14679, section 3). The logits of all tokens would be the largest tensor of
all, so the head runs on a few tokens at a time, and the gradients of these are computed with their loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Range of tokens -> logits `[tokens, V]` of the teacher.
TeacherLogits: TypeAlias = Callable[[slice], torch.Tensor]
_CHUNK_BYTES = 1 << 27  # of float32 logits of one model
_TINY = torch.finfo(torch.float32).tiny


def chunk_tokens(vocabulary: int) -> int:
    """Return how many tokens the head runs on at a time."""
    return max(1, _CHUNK_BYTES // (4 * vocabulary))


def head_logits(model: PreTrainedModel, hidden: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the logits of a model in float32.

    Args:
        model: A causal LM.
        hidden: `[T, H]`, what its decoder returns.
        parameters: Weight `[V, H]` of its head, and bias `[V]` if it has one. They are passed in and not looked up,
            since hooks of sharded modules must not run here.

    Returns:
        `[T, V]`, as the model's own forward scales and caps them.
    """
    logits = F.linear(hidden, *(parameter.to(hidden.dtype) for parameter in parameters)).float()
    config = model.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)  # granite
    logits = logits if scaling is None else logits / scaling
    cap = getattr(config, "final_logit_softcapping", None)  # gemma2, gemma3
    return logits if cap is None else cap * torch.tanh(logits / cap)


def divergence(
    model: PreTrainedModel, hidden: torch.Tensor, teacher: TeacherLogits, *, chunk: int | None = None
) -> torch.Tensor:
    """Return the mean over tokens of KL(teacher || student), a float32 scalar with gradients.

    Args:
        model: The student, whose head is applied.
        hidden: `[B, S, H]`, what its decoder returned.
        teacher: The logits of its teacher on the same tokens, counted over the batch.
        chunk: Tokens at a time; None: see `chunk_tokens`.
    """
    head: Any = model.get_output_embeddings()
    if hasattr(head, "unshard"):  # by FSDP2, whose hooks do this only when the module itself runs
        head.unshard()
    parameters = list(head.parameters())
    chunk = chunk or chunk_tokens(len(parameters[0]))
    return _Divergence.apply(hidden.flatten(0, 1), (model, teacher, chunk), *parameters)  # type: ignore[return-value]


def _value_and_gradient(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over tokens of KL(teacher || student), and its gradient by the student's logits: q - p.

    Args:
        student: Logits `[T, V]`, float32.
        teacher: Logits `[T, V]`, float32.
    """
    expected, found = teacher.log_softmax(-1), student.log_softmax(-1)
    p = expected.exp()
    value = torch.dot(p.flatten(), expected.sub_(found).flatten())
    return value, found.exp_().sub_(p)


class _Divergence(torch.autograd.Function):
    """The divergence over tokens `[T, H]`; its backward only returns gradients that the forward has computed."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, task: tuple, *parameters: torch.Tensor) -> torch.Tensor:
        model, teacher, chunk = task
        wanted = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]
        sources = hidden, *parameters
        gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(sources, wanted, strict=True)]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            inputs = [x.detach().requires_grad_(n) for x, n in zip((hidden[rows], *parameters), wanted, strict=True)]
            with torch.enable_grad():
                logits = head_logits(model, inputs[0], inputs[1:])
            value, gradient = _value_and_gradient(logits.detach(), teacher(rows).float())
            total += value / len(hidden)
            computed = ()
            if any(wanted):
                gradient.div_(len(hidden))
                computed = torch.autograd.grad(logits, [x for x in inputs if x.requires_grad], gradient)
            slots = [i for i, needed in enumerate(wanted) if needed]
            for slot, part in zip(slots, computed, strict=True):
                target: Any = gradients[slot]
                (target[rows] if slot == 0 else target).add_(part)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx, *outer: torch.Tensor) -> tuple:
        hidden, *parameters = (None if x is None else x * outer[0] for x in ctx.gradients)
        del ctx.gradients
        return hidden, None, *parameters


def hidden_error(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over layers and tokens of ||h - t||^2 / ||t||^2, a float32 scalar with gradients.

    Relative, since a few tokens have hidden states that are hundreds of times as large as the others'.

    Args:
        student: h of every layer, `[B, S, H]`.
        teacher: t of the same layers, `[B, S, H]`.
    """
    errors = [
        ((h.float() - t.float()).square().sum(-1) / t.float().square().sum(-1).clamp_min(_TINY)).mean()
        for h, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()
