"""Uninitialised memory that holds NaN, so that tests detect elements that are never written."""

import torch


def poison_empty(monkeypatch):
    """Patch `torch.empty` to return NaN in every floating-point element."""
    original = torch.empty

    def empty(*args, **kwargs):
        tensor = original(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)
