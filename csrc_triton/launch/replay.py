"""Replays: the launches of a plan, repeated for other tensors of the same shapes.

Planning a GLU MLP and letting Triton look up its compiled kernels takes the host longer than the kernels of a few
tokens take the GPU. A replay only allocates and launches. It holds no tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton.launch.call import MatmulCall, Plan

logger = logging.getLogger(__name__)

# A plan works on numbered tensors: the tokens, the weights and the biases, the output, and then its temporaries.
X, GATE_UP, DOWN, *_, OUTPUT, TEMPORARY = range(11)

# gate_up `[2, IP, H]`, down `[H, IP]`, then the biases and the scales of gate, up and down or None: eight in all
Weights = Sequence[torch.Tensor | None]
Addresses = Sequence[int | None]


def make_replay(plan: Plan, x: torch.Tensor, weights: Weights) -> Replay | None:
    """Return the replay of a plan that has been run on `x` `[M, H]`; None if the plan cannot be replayed.

    A plan can be replayed if every tensor in it is one of its inputs, its output, a temporary, or a view of these. The
    replay of a plan without products is run once and compared with the plan's output, bit for bit. Do not call this
    while a CUDA graph is captured.
    """
    try:
        replay = Replay(plan, x, weights)
    except _NotReplayable:
        return None
    only_kernels = all(isinstance(step, _Kernel) for step in replay.steps)
    if only_kernels and not _same_bits(replay.run(x, weights), plan.output):
        names = [call.kernel.__name__ for call in plan.calls]
        logger.warning("a replay of %s differs from its first run: it is not used", names)
        return None
    return replay


class Replay:
    """The launches of a plan that has been run, for tensors of the same shapes, strides, dtypes and alignment.

    Raises `_NotReplayable` for other plans; see `make_replay`.
    """

    def __init__(self, plan: Plan, x: torch.Tensor, weights: Weights):
        self.numbers = _Numbers(plan.output, (x, *weights))
        self.steps = [
            _Matmul(call, self.numbers) if isinstance(call, MatmulCall) else _Kernel(call, self.numbers)
            for call in plan.calls
        ]
        self.numbers.check_all_used()

    def run(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Return the output for contiguous tokens `x` `[..., H]`, launched on the current device and stream.

        Nothing is checked. A weight may be passed in place of the buffer that starts at the same address.
        """
        tensors = [x.view(-1, x.shape[-1]), *weights, *[None] * len(self.numbers.new)]
        for step in self.steps:
            step.run(tensors)
        y: Any = tensors[OUTPUT]
        return y.view(x.shape)

    def bind(self, addresses: Addresses, device: torch.device) -> BoundReplay | None:
        """Return the replay for weights at fixed addresses; None if a launch takes more than addresses."""
        kernels = [step for step in self.steps if isinstance(step, _Kernel) and step.takes_addresses]
        return BoundReplay(kernels, self.numbers, addresses, device) if len(kernels) == len(self.steps) else None


class BoundReplay:
    """The launches of a replay for weights at fixed addresses, which take the host the least time."""

    def __init__(self, kernels: Sequence[_Kernel], numbers: _Numbers, addresses: Addresses, device: torch.device):
        fixed = dict(zip(range(GATE_UP, OUTPUT), addresses, strict=True))
        self._index = device.index or 0
        size, starts = 0, {}  # bytes of one tensor that holds all temporaries, and where each begins
        for number in range(TEMPORARY, len(numbers.new) + OUTPUT):
            shape, dtype = numbers.new[number]
            starts[number] = size
            size += -(-shape.numel() * dtype.itemsize // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        self._scratch = size // numbers.new[OUTPUT][1].itemsize  # elements of the dtype of x
        self._launches = []
        for step in kernels:
            arguments, moving = step.arguments.copy(), []
            for position, view in step.views:
                offset = view.offset * view.itemsize
                if view.number in fixed:
                    arguments[position] = fixed[view.number] + offset
                elif view.number in starts:
                    moving.append((position, 2, starts[view.number] + offset))
                else:
                    moving.append((position, 1 if view.number == OUTPUT else 0, offset))
            self._launches.append((step.kernel, step.grid, arguments, moving))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for contiguous tokens `x` `[..., H]`, launched on the current device and stream.

        Nothing is checked.
        """
        y = torch.empty_like(x)
        scratch = x.new_empty(self._scratch) if self._scratch else y
        bases = x.data_ptr(), y.data_ptr(), scratch.data_ptr()
        active: Any = driver.active
        stream = active.get_current_stream(self._index)
        for kernel, grid, fixed, moving in self._launches:
            arguments = fixed.copy()  # other threads may replay at the same time
            for position, base, offset in moving:
                arguments[position] = bases[base] + offset
            _launch(kernel, grid, stream, arguments)
        return y


def _launch(kernel: Any, grid: tuple[int, ...], stream: int, arguments: Sequence[object]) -> None:
    """Launch a compiled kernel on the current device."""
    if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:  # a profiler's
        kernel[grid](*arguments)
    else:  # what the line above does, without collecting what hooks are called with
        kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)


SCRATCH_ALIGNMENT = 512  # bytes; that of CUDA's allocator


class _View(NamedTuple):
    """A tensor of a launch: the numbered tensor, or a view of it."""

    number: int
    is_whole: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements from the first element of the numbered tensor
    itemsize: int

    def of(self, tensors: Sequence[Any]) -> torch.Tensor:
        base = tensors[self.number]
        return base if self.is_whole else base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)

    def address(self, tensors: Sequence[Any]) -> int:
        return tensors[self.number].data_ptr() + self.offset * self.itemsize


class _Kernel:
    """A launch of a compiled kernel, or of one in the interpreter."""

    def __init__(self, call: Any, numbers: _Numbers):
        self.kernel, self.grid = call.compiled(), call.grid_3d
        self.arguments = call.arguments()
        self.views, self._descriptors = [], []
        for position, value in enumerate(self.arguments):
            if isinstance(value, torch.Tensor):
                self.views.append((position, numbers.view(value)))
            elif isinstance(value, TensorDescriptor):
                fields = {name: part for name, part in vars(value).items() if name != "base"}
                self._descriptors.append((position, numbers.view(value.base), fields))
            else:
                continue
            self.arguments[position] = None
        self._new = numbers.newly_seen()
        self._compiled = isinstance(self.kernel, CompiledKernel)
        self.takes_addresses = self._compiled and not self._descriptors

    def run(self, tensors: list) -> None:
        for number, shape, dtype in self._new:
            tensors[number] = tensors[X].new_empty(shape, dtype=dtype)
        arguments = self.arguments.copy()
        for position, view in self.views:
            # An address saves the launcher a query to the driver. The interpreter needs tensors.
            arguments[position] = view.address(tensors) if self._compiled else view.of(tensors).detach()
        for position, view, fields in self._descriptors:
            descriptor = object.__new__(TensorDescriptor)  # the constructor's checks passed for the first tensor
            descriptor.__dict__.update(fields, base=view.of(tensors))
            arguments[position] = descriptor
        if self._compiled:
            active: Any = driver.active
            _launch(self.kernel, self.grid, active.get_current_stream(active.get_current_device()), arguments)
        else:
            self.kernel[self.grid](*arguments)


class _Matmul:
    """A product by cuBLAS."""

    def __init__(self, call: MatmulCall, numbers: _Numbers):
        self._x, self._weight = numbers.view(call.x), numbers.view(call.weight)
        self._bias = None if call.bias is None else numbers.view(call.bias)
        self._out = numbers.view(call.out)
        self._new = numbers.newly_seen()

    def run(self, tensors: list) -> None:
        x, weight = self._x.of(tensors), self._weight.of(tensors)
        bias = None if self._bias is None else self._bias.of(tensors)
        if self._out.is_whole:
            tensors[self._out.number] = F.linear(x, weight, bias)
            return
        for number, shape, dtype in self._new:
            tensors[number] = x.new_empty(shape, dtype=dtype)
        torch.mm(x, weight.t(), out=self._out.of(tensors))


class _Numbers:
    """Numbers the tensors of a plan in the order of their first use, after the given ones."""

    def __init__(self, output: torch.Tensor, given: Sequence[torch.Tensor | None]):
        self._known: dict[int, tuple[int, torch.Tensor]] = {}  # by identity
        self._owners: dict[int, tuple[int, torch.Tensor]] = {}  # by storage
        self.new: dict[int, tuple[torch.Size, torch.dtype]] = {}  # the output and the temporaries
        self._unused, self._fresh = set(), []
        for number, tensor in enumerate((*given, output)):
            if tensor is None:
                continue
            if id(tensor) in self._known:
                raise _NotReplayable("one tensor for two inputs, which other inputs of these shapes need not share")
            self._known[id(tensor)] = number, tensor
            self._owners.setdefault(_storage(tensor), (number, tensor))
            self._unused.add(number)
        self.new[OUTPUT] = output.shape, output.dtype

    def view(self, tensor: torch.Tensor) -> _View:
        """Return a tensor of the plan as a view of a numbered one; an unknown tensor becomes a temporary."""
        if id(tensor) not in self._known and _storage(tensor) not in self._owners:
            self._add_temporary(tensor)
        is_whole = id(tensor) in self._known
        number, base = self._known[id(tensor)] if is_whole else self._owners[_storage(tensor)]
        if base.dtype != tensor.dtype or (number == X and not is_whole):
            raise _NotReplayable("a view of the tokens, or of another dtype")
        if number in self._unused:
            self._unused.remove(number)
            if number == OUTPUT:
                self._fresh.append(number)
        offset = int(tensor.storage_offset() - base.storage_offset())
        # A weight may be passed in place of its buffer: down `[H, I]` is all of it only without padding.
        if number == GATE_UP or (number == DOWN and tensor.untyped_storage().nbytes() != tensor.nbytes):
            is_whole = False
        return _View(number, is_whole, tensor.shape, tensor.stride(), offset, tensor.dtype.itemsize)

    def newly_seen(self) -> list[tuple[int, torch.Size, torch.dtype]]:
        """Return the output and the temporaries that were first used since the last call."""
        fresh, self._fresh = self._fresh, []
        return [(number, *self.new[number]) for number in fresh]

    def check_all_used(self) -> None:
        """Raise where the plan works on a copy of an input."""
        if self._unused:
            raise _NotReplayable("a copy of an input")

    def _add_temporary(self, tensor: torch.Tensor) -> None:
        number = OUTPUT + len(self.new)
        elements = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        if elements == tensor.numel() and tensor.is_contiguous():
            self._known[id(tensor)] = number, tensor
            base = tensor
        else:  # the first of several views
            base = tensor.as_strided((elements,), (1,), 0)
        self._owners[_storage(tensor)] = number, base
        self.new[number] = base.shape, base.dtype
        self._fresh.append(number)


class _NotReplayable(Exception):
    pass


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))  # also where both are NaN
