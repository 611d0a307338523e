"""The short way through a patched MLP: what one call found out is kept, and the next calls check that it still holds.

Examining an MLP's modules and weights, finding a launch and filling its arguments takes the host longer than the MLP of
a few tokens takes the GPU. A call that ran fused without autograd therefore leaves a `Prepared` on its MLP. Later calls
compare everything that `gluprune.runtime.fusion` examines; if anything has changed, the MLP is examined again. A
`Prepared` refers to no tensor and no module, so weights that are replaced are freed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._C._dynamo.guards import TensorGuards

from gluprune.runtime import fusion, operator

MOST_LENGTHS = 64  # numbers of tokens that one MLP keeps launches for


class Prepared:
    """The guards and the launches of one patched MLP, for the weights that it has now. See `of`."""

    @classmethod
    def of(cls, mlp: fusion.PatchedMLP, up_row: int) -> Prepared | None:
        """Return the guards of an MLP that ran fused; None if there is no fast way to check them.

        Args:
            mlp: A patched MLP that is fusible in this call.
            up_row: The result of `csrc_triton.layout.first_up_row` for its weights.
        """
        return cls(mlp, up_row) if mlp.family.activation in mlp._modules else None

    def __init__(self, mlp: fusion.PatchedMLP, up_row: int):
        family, modules = mlp.family, mlp._modules
        if family.activation not in modules:
            raise ValueError(f"{family.activation} is no submodule")
        self._activation_name, self._activation_type = family.activation, type(modules[family.activation])
        self._activation_forward = vars(modules[family.activation]).get("forward")
        self._activation, self._backend, self._up_row = fusion.activation_name(mlp), mlp.backend, up_row
        self._projections = []
        tensors = []
        for name in dict.fromkeys((family.gate, family.up, family.down)):
            parameters = modules[name]._parameters
            self._projections.append((name, vars(modules[name]).get("forward"), parameters["bias"] is not None))
            tensors += [tensor for tensor in parameters.values() if tensor is not None]
        shapes: Any = [list(tensor.shape) for tensor in tensors]
        strides: Any = [list(tensor.stride()) for tensor in tensors]
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
        self._is_trainable = any(tensor.requires_grad for tensor in tensors)
        self._data = [tensor.data_ptr() for tensor in tensors]
        gate, _, down, *biases = fusion.operands(mlp)
        self._down = next(number for number, tensor in enumerate(tensors) if tensor is down)
        self._sizes = gate.untyped_storage().nbytes(), down.untyped_storage().nbytes()
        self._addresses: Any = tuple(None if tensor is None else tensor.data_ptr() for tensor in (gate, down, *biases))
        self._dtype, self._device, self._hidden = down.dtype, down.device, down.shape[0]
        self._index = down.device.index
        self._launches: dict[object, Any] = {}

    def takes(self, x: torch.Tensor) -> bool:
        """Return whether there are launches for inputs such as `x`, if the MLP is as it was."""
        return (
            type(x) is torch.Tensor
            and x.dtype is self._dtype
            and x.device == self._device
            and x.layout is torch.strided
            and x.is_contiguous()
            and not x.is_neg()
            and x.shape[-1] == self._hidden
            and not ((x.requires_grad or self._is_trainable) and torch.is_grad_enabled())
        )

    def holds(self, mlp: fusion.PatchedMLP) -> bool:
        """Return whether the MLP, its weights and PyTorch's global state are as they were.

        `TensorGuards` compares types, dtypes, devices, shapes, strides and requires_grad of the weights, and the
        dispatch keys: under autocast, dispatch modes, functorch's transforms, tracing or another inference mode, these
        differ.
        """
        modules, tensors = mlp._modules, []
        for name, forward, has_bias in self._projections:
            module = modules[name]
            if type(module) is not nn.Linear:
                return False
            attributes = module.__dict__
            if _has_hooks(attributes) or attributes.get("forward") is not forward:
                return False
            parameters = attributes["_parameters"]
            tensors.append(parameters.get("weight"))
            if has_bias:
                tensors.append(parameters.get("bias"))
            elif parameters.get("bias") is not None:
                return False
        activation = modules[self._activation_name]
        attributes = activation.__dict__
        if type(activation) is not self._activation_type or _has_hooks(attributes):
            return False
        if attributes.get("forward") is not self._activation_forward or fusion.is_intercepted():
            return False
        if not self._guards.check(*tensors) or [tensor.data_ptr() for tensor in tensors] != self._data:
            return False
        sizes = tensors[0].untyped_storage().nbytes(), tensors[self._down].untyped_storage().nbytes()
        return sizes == self._sizes

    def run(self, mlp: fusion.PatchedMLP, x: torch.Tensor) -> torch.Tensor | None:
        """Return the MLP's output for `x` `[..., H]`; None if there can be no launches for such tokens."""
        key: object = x.numel() // self._hidden, x.data_ptr() % 16
        if self._dtype is torch.float32:
            key = key, operator.input_precision(self._dtype)
        launch, takes_weights = self._launches.get(key) or self._find(mlp, x, key)
        if launch is None:
            return None
        arguments: tuple = (x,)
        if takes_weights:
            gate, _, *others = fusion.operands(mlp)
            arguments = x, (gate, *others)
        if self._index is None or torch.cuda.current_device() == self._index:
            return launch(*arguments)
        with torch.cuda.device(self._index):
            return launch(*arguments)

    def _find(self, mlp: fusion.PatchedMLP, x: torch.Tensor, key: object) -> tuple[Any, bool]:
        """Return how to launch for tokens such as `x`, and whether that takes the weights."""
        with torch.cuda.device_of(x):
            operands = fusion.operands(mlp)
            replay = operator.find_replay(x, self._up_row, operands, self._activation, self._backend)
        if replay is None:
            return None, False
        bound = replay.bind(self._addresses, x.device)
        found = (replay.run, True) if bound is None else (bound.run, False)
        if len(self._launches) >= MOST_LENGTHS:
            self._launches = {}
        self._launches[key] = found
        return found


def _has_hooks(attributes: dict[str, Any]) -> bool:
    """Whether a module with these attributes has hooks."""
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    )
