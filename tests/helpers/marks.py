"""Marks of single cases of a parametrised test."""

import pytest


def slow(*values):
    """Values of a parametrised test, marked as slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
