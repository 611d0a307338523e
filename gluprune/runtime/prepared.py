"""The fast path of a patched module: what one call found is kept, and later calls check that it still holds.

Examining an MLP's modules and weights, finding a launch and filling its arguments takes the host longer than the MLP of
a few tokens takes the GPU. A call that ran fused without autograd therefore leaves a `Prepared` on its module. Later
calls compare everything that `gluprune.runtime.fusion` examines; if anything has changed, the module is examined again.
A `Prepared` refers to no tensor and no module, so weights that are replaced are freed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards

from gluprune.runtime import fusion, operator, sharding
from gluprune.runtime.classes import PREPARED

_PARAMETERS = ("weight", "bias", "scale")  # of a projection
MOST_LENGTHS = 64  # numbers of tokens that one module keeps launches for


class Prepared:
    """The guards and the launches of one patched module, for the parameters that it has now.

    Args:
        parameters: All that the launches read, on one device.
        hidden: Size of the last dimension of input and output.
        dtype: Of input and output.
    """

    def __init__(self, parameters: list[torch.Tensor], hidden: int, dtype: torch.dtype):
        shapes: Any = [list(tensor.shape) for tensor in parameters]
        strides: Any = [list(tensor.stride()) for tensor in parameters]
        self._guards = TensorGuards(*parameters, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
        self._is_trainable = any(tensor.requires_grad for tensor in parameters)
        self._data = [tensor.data_ptr() for tensor in parameters]
        self._dtype, self._device, self._hidden = dtype, parameters[0].device, hidden
        self._launches: dict[object, Any] = {}

    def takes(self, x: torch.Tensor) -> bool:
        """Return whether there are launches for inputs such as `x`, if the module is as it was."""
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

    def _same_tensors(self, parameters: list[Any]) -> bool:
        """Return whether parameters and PyTorch's global state are as they were.

        `TensorGuards` compares types, dtypes, devices, shapes, strides and requires_grad, and the dispatch keys: under
        autocast, dispatch modes, functorch's transforms, tracing or another inference mode, these differ.
        """
        if fusion.is_intercepted() or not self._guards.check(*parameters):
            return False
        return [tensor.data_ptr() for tensor in parameters] == self._data

    def run(self, module: Any, x: torch.Tensor) -> torch.Tensor | None:
        """Return the module's output for `x` `[..., H]`; None if there can be no launches for such tokens."""
        key: object = x.numel() // self._hidden, x.data_ptr() % 16
        if self._dtype is torch.float32:
            key = key, operator.input_precision(self._dtype)
        launch, takes_weights = self._launches.get(key) or self._find(module, x, key)
        if launch is None:
            return None
        arguments = (x, self._weights(module)) if takes_weights else (x,)
        index = self._device.index
        if index is None or torch.cuda.current_device() == index:
            return launch(*arguments)
        with torch.cuda.device(index):
            return launch(*arguments)

    def _find(self, module: Any, x: torch.Tensor, key: object) -> tuple[Any, bool]:
        """Return how to launch for tokens such as `x`, and whether that takes the weights."""
        with torch.cuda.device_of(x):
            replay = self._replay(module, x)
        if replay is None:
            return None, False
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in self._weights(module)]
        bound = replay.bind(addresses, x.device)
        found = (replay.run, True) if bound is None else (bound.run, False)
        if len(self._launches) >= MOST_LENGTHS:
            self._launches = {}
        self._launches[key] = found
        return found

    def _replay(self, module: Any, x: torch.Tensor) -> Any:
        """Return the replay for tokens such as `x`, or None."""
        raise NotImplementedError

    def _weights(self, module: Any) -> tuple[torch.Tensor | None, ...]:
        """Return the weights, biases and scales that a replay takes."""
        raise NotImplementedError


def run_prepared(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Return the output of a patched module that has kept its launches; None if it must be examined."""
    prepared = module.__dict__.get(PREPARED)
    if prepared is not None and prepared.holds(module) and prepared.takes(x):
        return prepared.run(module, x)
    return None


def keep_prepared(module: Any, prepare: Callable[[], Prepared | None]) -> None:
    """Keep the guards and launches of a module that runs fused in this call, unless those that it has still hold."""
    prepared = module.__dict__.get(PREPARED)
    if prepared is None or not prepared.holds(module):  # they may hold, for other inputs
        module.__dict__[PREPARED] = prepare()


class PreparedMLP(Prepared):
    """The guards and the launches of one patched MLP. See `of`."""

    @classmethod
    def of(cls, mlp: fusion.PatchedMLP, up_row: int) -> PreparedMLP | None:
        """Return the guards of an MLP that ran fused; None if there is no fast way to check them.

        Args:
            mlp: A patched MLP that is fusible in this call.
            up_row: The result of `csrc_triton.layout.first_up_row` for its weights.
        """
        return cls(mlp, up_row) if mlp.family.activation in mlp._modules else None

    def __init__(self, mlp: fusion.PatchedMLP, up_row: int):
        family, modules = mlp.family, mlp._modules
        activation = modules[family.activation]
        self._activation_name, self._activation_type = family.activation, type(activation)
        self._activation_forward = vars(activation).get("forward")
        self._options = up_row, fusion.activation_name(mlp), mlp.backend
        self._projections, tensors = [], []
        for name in dict.fromkeys((family.gate, family.up, family.down)):
            module, parameters = modules[name], modules[name]._parameters
            present = [key for key in _PARAMETERS if parameters.get(key) is not None]
            self._projections.append((name, type(module), vars(module).get("forward"), present))
            tensors += [sharding.local(parameters[key]) for key in present]
        gate, _, down, *_ = fusion.operands(mlp)
        super().__init__(tensors, hidden=down.shape[0], dtype=fusion.dtype_of(modules[family.down]))
        self._group = sharding.group_of(mlp)
        self._is_trainable = self._is_trainable or self._group is not None
        self._down = next(number for number, tensor in enumerate(tensors) if tensor is down)
        self._sizes = gate.untyped_storage().nbytes(), down.untyped_storage().nbytes()

    def holds(self, mlp: fusion.PatchedMLP) -> bool:
        """Return whether the MLP, its parameters and PyTorch's global state are as they were."""
        modules, tensors = mlp._modules, []
        for name, kind, forward, present in self._projections:
            module = modules[name]
            if type(module) is not kind:
                return False
            attributes = module.__dict__
            if fusion.has_hooks(attributes) or attributes.get("forward") is not forward:
                return False
            parameters = attributes["_parameters"]
            tensors += map(parameters.get, present)
            if "bias" not in present and parameters.get("bias") is not None:
                return False
        activation = modules[self._activation_name]
        attributes = activation.__dict__
        if type(activation) is not self._activation_type or fusion.has_hooks(attributes):
            return False
        if self._group is not None:
            tensors = [sharding.local(tensor) for tensor in tensors]
        if attributes.get("forward") is not self._activation_forward or not self._same_tensors(tensors):
            return False
        sizes = tensors[0].untyped_storage().nbytes(), tensors[self._down].untyped_storage().nbytes()
        return sizes == self._sizes

    def run(self, module: fusion.PatchedMLP, x: torch.Tensor) -> torch.Tensor | None:
        """Return the MLP's output for `x` `[..., H]`, summed over ranks; None if there can be no launches."""
        y = super().run(module, x)
        return y if y is None or self._group is None else sharding.sum_over_ranks(y, module, self._group)

    def _replay(self, module: fusion.PatchedMLP, x: torch.Tensor) -> Any:
        up_row, activation, backend = self._options
        return operator.find_replay(x, up_row, fusion.operands(module), activation, backend)

    def _weights(self, module: fusion.PatchedMLP) -> tuple[torch.Tensor | None, ...]:
        return operator.replayed(fusion.operands(module))


class PreparedNorm(Prepared):
    """The guards and the launches of one patched norm.

    Args:
        norm: A patched norm that is fusible in this call.
    """

    def __init__(self, norm: Any):
        weight = norm._parameters["weight"]
        super().__init__([weight], hidden=weight.shape[0], dtype=weight.dtype)
        self._eps = fusion.epsilon(norm)

    def holds(self, norm: Any) -> bool:
        """Return whether the norm, its weight and PyTorch's global state are as they were."""
        return fusion.epsilon(norm) == self._eps and self._same_tensors([norm._parameters.get("weight")])

    def _replay(self, module: Any, x: torch.Tensor) -> Any:
        return operator.find_norm_replay(x, module._parameters["weight"], self._eps, module.rounding)

    def _weights(self, module: Any) -> tuple[torch.Tensor | None, ...]:
        return module._parameters["weight"], *[None] * 7
