"""Comparisons shared by the tests of patching together with other libraries."""

import torch

from gluprune.runtime.fusion import fusion_status

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def reasons(model):
    return [entry.reason for entry in fusion_status(model)]
