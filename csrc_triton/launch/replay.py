"""Replays: the launches of a plan for few tokens, repeated for other tensors of the same shapes.

For few tokens, planning a GLU MLP and letting Triton look up its compiled kernels takes the host longer than the
kernels take the GPU. A replay only allocates and launches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.compiler import CompiledKernel

from csrc_triton.launch.call import KernelCall, Plan

logger = logging.getLogger(__name__)

Tensors = Sequence[torch.Tensor | None]


class Replay:
    """The launches of a plan that has been run: its compiled kernels, and which of their arguments are tensors."""

    def __init__(self, plan: Plan, inputs: Tensors, compiled: Sequence[Any]):
        place = {id(tensor): number for number, tensor in enumerate((*inputs, plan.output)) if tensor is not None}
        self._temporaries: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._launches: list[tuple[Callable[..., None], list[object], list[tuple[int, int]]]] = []
        # An address saves the launcher a query to the driver. The interpreter needs tensors.
        self._argument = torch.Tensor.data_ptr if isinstance(compiled[0], CompiledKernel) else torch.Tensor.detach
        for call, kernel in zip(plan.calls, compiled, strict=True):
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
        """Fill `output` for other `inputs`, of the shapes, strides, dtypes, device and alignment of the first ones.

        Nothing is checked. Only addresses matter: a weight may be passed in place of the buffer that starts at the same
        address.
        """
        tensors = [*inputs, output]
        for shape, dtype, device in self._temporaries:
            tensors.append(torch.empty(shape, dtype=dtype, device=device))
        places = [None if tensor is None else self._argument(tensor) for tensor in tensors]
        for launch, arguments, positions in self._launches:
            arguments = arguments.copy()  # noqa: PLW2901 - other threads may replay at the same time
            for position, number in positions:
                arguments[position] = places[number]
            launch(*arguments)


def make_replay(plan: Plan, inputs: Tensors) -> Replay | None:
    """Return the replay of a plan that has been run; None if the plan cannot be replayed.

    A plan can be replayed if it holds only kernels, on the inputs and on whole new tensors. The replay is run once and
    compared with the plan's output, bit for bit. Do not call this while a CUDA graph is captured.
    """
    if not all(isinstance(call, KernelCall) for call in plan.calls):
        return None  # a product of cuBLAS
    values = [value for call in plan.calls for value in call.args.values() if not isinstance(value, int | None)]
    known = {id(tensor) for tensor in inputs if tensor is not None}
    if not _replayable(values, known) or len(known) < sum(tensor is not None for tensor in inputs):
        return None  # the latter: one tensor for two inputs, which other inputs of these shapes need not share
    replay = Replay(plan, inputs, [call.compiled() for call in plan.calls])
    replayed = torch.empty_like(plan.output)
    replay.run(inputs, replayed)
    if not _same_bits(replayed, plan.output):
        names = [call.kernel.__name__ for call in plan.calls]
        logger.warning("a replay of %s differs from its first run: it is not used", names)
        return None
    return replay


def _replayable(values: Sequence[object], known: set[int]) -> bool:
    """Return whether the arguments of kernels are the `known` inputs, by id, and whole new tensors."""
    if not known <= {id(value) for value in values}:
        return False  # the plan works on a view or a copy of an input
    for value in values:
        if not isinstance(value, torch.Tensor):
            return False  # a descriptor
        if id(value) not in known and value.untyped_storage().nbytes() != value.nbytes:
            return False  # part of a tensor that is not an input
    return True


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # also where both are NaN
