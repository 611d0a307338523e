"""Comparisons shared by the tests of patching."""

import torch

from gluprune.runtime.fusion import fusion_status

# Logits are of order one; kernels and PyTorch sum the same products in different orders.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def assert_fused(model, count=2):
    status = fusion_status(model)
    assert [entry.fused for entry in status] == [True] * count, status


def assert_same(actual, expected, dtype=torch.float32):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
