"""Uninitialised memory that holds NaN, so that tests detect elements that are never written."""

import torch


def poison_empty(monkeypatch):
    """Let every way to allocate uninitialised memory return NaN in every floating-point element."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(original):
    def allocate(*args, **kwargs):
        tensor = original(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate
