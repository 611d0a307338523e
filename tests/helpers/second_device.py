"""A second device without a GPU: "second:0" computes on the CPU, and rejects operations on tensors of two devices.

Registered for the whole process: import this in a process of its own. It needs PyTorch's support for devices that are
written in Python, which old versions lack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map

NAME = "second"
# Operations that move values between devices.
_TRANSFERS = ("aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense")
# Operations whose index may be on the CPU, as on CUDA.
_INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")


class _Tensor(torch.Tensor):
    """A tensor on the second device.

    Attributes:
        values: The tensor on the CPU that holds its values.
    """

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, *args, **(kwargs or {}))

    def tolist(self):
        return self.detach().values.tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert a {NAME} tensor to numpy")

    __array__ = numpy

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new: _Tensor):
        torch.Tensor.data.__set__(self, new)  # shape and strides
        self.values = new.values


def _on_cpu(value: Any) -> Any:
    return value.values if isinstance(value, _Tensor) else value


def _on_second(value: Any) -> Any:
    return _Tensor(value) if type(value) is torch.Tensor else value


def _check(name: str, args: tuple, kwargs: dict) -> None:
    """Check that all tensors are on the second device, except for scalars and indices, as CUDA requires."""
    allowed = tree_flatten(args[1])[0] if name in _INDEXING else []
    for value in tree_flatten((args, kwargs))[0]:
        if type(value) is torch.Tensor and value.dim() and not any(value is index for index in allowed):
            raise RuntimeError(f"{name} has a tensor {tuple(value.shape)} on {value.device}, others on {NAME}")


def _run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the CPU; its result is on the second device unless it was to be copied elsewhere."""
    schema, target = function._schema, kwargs.get("device")
    if schema.name not in _TRANSFERS:
        _check(schema.name, args, kwargs)
    options = tree_map(_on_cpu, kwargs) | ({} if target is None else {"device": torch.device("cpu")})
    result = function(*tree_map(_on_cpu, args), **options)
    if schema.name == "aten::_local_scalar_dense" or (target is not None and target.type == "cpu"):
        return result
    if schema.is_mutable and schema.returns:
        return kwargs.get("out", args[0])
    return tree_map(_on_second, result)


def _created_on(create: Any) -> Any:
    """Return `torch.tensor` or `torch.as_tensor` for all devices: they fail for devices that are written in Python."""

    def created(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        made = data if isinstance(data, _Tensor) else create(data, **options)
        return made if device is None else made.to(device)

    return created


backend_registration._setup_privateuseone_for_python_backend(NAME)
_library = torch.library.Library("_", "IMPL")
_library.fallback(_run, "PrivateUse1")
torch.tensor, torch.as_tensor = _created_on(torch.tensor), _created_on(torch.as_tensor)
