"""Swapping the class of single modules, so that other models and the module tree stay as they are."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

PREPARED = "_prepared"  # the attribute of a patched module that holds its `Prepared`


class Swapped(nn.Module):
    """Base of the classes of patched modules: what they need to be copied, pickled and undone.

    The state of such a class is in its class attributes; instances hold only what their last calls found.
    """

    original_class: type[nn.Module]
    backend: str

    @staticmethod
    def class_attributes(original: type[nn.Module]) -> dict[str, Any]:
        """Return the further attributes of the class for modules of class `original`."""
        raise NotImplementedError

    def __reduce__(self):
        state = {name: value for name, value in self.__dict__.items() if name != PREPARED}
        return _new_instance, (_base(type(self)), self.original_class, self.backend), state


@functools.cache
def fused_class(base: type[Swapped], original: type[nn.Module], backend: str) -> Any:
    """Return the subclass of `original` whose forward is that of `base`, the same one at each call."""
    contents = {"original_class": original, "backend": backend, **base.class_attributes(original)}
    return type(f"Fused{original.__name__}", (base, original), contents)


def set_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Change the class of a module."""
    old = type(module)
    for name in ("forward", "_old_forward"):  # accelerate leaves bound methods on the instance
        if getattr(module.__dict__.get(name), "__func__", None) is old.forward:
            module.__dict__[name] = types.MethodType(new.forward, module)
    module.__dict__.pop(PREPARED, None)
    module.__class__ = new


def _base(fused: type) -> type[Swapped]:
    return fused.__bases__[0]


def _new_instance(base: type[Swapped], original: type[nn.Module], backend: str) -> Swapped:
    fused = fused_class(base, original, backend)
    return fused.__new__(fused)
