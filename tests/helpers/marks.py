"""Marks of single cases of a parametrised test."""

import pytest

from gluprune.models.families import FAMILIES

# One family of each kind of MLP and norms: `make check` runs these.
TYPICAL = ("llama", "qwen3", "gemma2", "phi3")


def slow(*values):
    """Values of a parametrised test, marked as slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def each_family(names=FAMILIES):
    """Names of model families; those that are not typical are marked as slow."""
    return [name if name in TYPICAL else slow(name)[0] for name in names]
