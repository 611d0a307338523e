"""Plans for few tokens, recorded: the launches of a plan for other tensors of the same shapes.

To plan a GLU MLP, and to let Triton look up what it has compiled, takes the host longer than its kernels take a GPU while
there are few tokens. A recording only allocates and launches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.compiler import CompiledKernel

from .launch import KernelCall, Plan

logger = logging.getLogger(__name__)

Tensors = Sequence[torch.Tensor | None]


class Recording:
    """What a plan that was run launches: compiled kernels, and at which places of their arguments the tensors belong."""

    def __init__(self, plan: Plan, inputs: Tensors, compiled: Sequence[Any]):
        place = {id(tensor): number for number, tensor in enumerate((*inputs, plan.output)) if tensor is not None}
        self._temporaries: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._launches: list[tuple[Callable[..., None], list[object], list[tuple[int, int]]]] = []
        # An address saves the launcher a question to the driver. The interpreter wants tensors.
        self._argument = torch.Tensor.data_ptr if isinstance(compiled[0], CompiledKernel) else torch.Tensor.detach
        for call, kernel in zip(plan.calls, compiled):
            arguments, tensors = call.arguments(), []
            for position, value in enumerate(arguments):
                if isinstance(value, torch.Tensor):
                    if id(value) not in place:
                        place[id(value)] = len(inputs) + 1 + len(self._temporaries)
                        self._temporaries.append((value.shape, value.dtype, value.device))
                    arguments[position] = None
                    tensors.append((position, place[id(value)]))
            self._launches.append((kernel[call.grid_3d], arguments, tensors))

    def run(self, inputs: Tensors, output: torch.Tensor) -> None:
        """Fill `output` for other `inputs`, of the shapes, strides, dtypes, device and alignment of those recorded.

        Nothing is checked. Only where they lie counts: a weight may stand for the buffer that it is the beginning of.
        """
        tensors = [*inputs, output]
        for shape, dtype, device in self._temporaries:
            tensors.append(torch.empty(shape, dtype=dtype, device=device))
        places = [None if tensor is None else self._argument(tensor) for tensor in tensors]
        for launch, arguments, positions in self._launches:
            arguments = arguments.copy()  # other threads replay it, too
            for position, number in positions:
                arguments[position] = places[number]
            launch(*arguments)


def record(plan: Plan, inputs: Tensors) -> Recording | None:
    """The recording of a plan that was run; None if it holds anything but kernels on the inputs and on whole new tensors.

    It is replayed once and compared with what the plan gave, bit for bit. Not while a CUDA graph is captured.
    """
    if not all(isinstance(call, KernelCall) for call in plan.calls):
        return None  # a product of cuBLAS
    values = [value for call in plan.calls for value in call.args.values() if not isinstance(value, int | None)]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return None  # a descriptor
    used, known = {id(value) for value in values}, {id(tensor) for tensor in inputs if tensor is not None}
    if not known <= used:
        return None  # the plan works on a view or a copy of an input
    if len(known) < sum(tensor is not None for tensor in inputs):
        return None  # one tensor for two inputs, which others of these shapes need not be
    if any(id(value) not in known and value.untyped_storage().nbytes() != value.nbytes for value in values):
        return None  # a part of a tensor that is not among them
    recording = Recording(plan, inputs, [call.compiled() for call in plan.calls])
    replayed = torch.empty_like(plan.output)
    recording.run(inputs, replayed)
    if not _same_bits(replayed, plan.output):
        logger.warning(
            "a replay of %s differs from its first run: it is not used", [c.kernel.__name__ for c in plan.calls]
        )
        return None
    return recording


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # NaN, too
