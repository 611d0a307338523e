"""Facts about devices: compute capability, multiprocessors, shared memory, precision. Queries no device at import."""

from __future__ import annotations

import functools

import torch

# Shared memory that one program may use, in bytes, and multiprocessors of the usual board, by compute capability.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SM_COUNT = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
DEFAULT_SM = 90  # the compute capability that tensors without a GPU are planned for
DEFAULT_SM_COUNT = SM_COUNT[DEFAULT_SM]


def compute_capability(device: torch.device) -> int:
    """Return the compute capability of a CUDA device times ten; `DEFAULT_SM` for any other device."""
    return _cuda_properties(device)[0] if device.type == "cuda" else DEFAULT_SM


def sm_count(device: torch.device, sm: int) -> int:
    """Return the multiprocessors of a CUDA device; those of the usual board of capability `sm` for any other device."""
    return _cuda_properties(device)[1] if device.type == "cuda" else usual_sm_count(sm)


def usual_sm_count(sm: int) -> int:
    """Return the multiprocessors of the usual board of compute capability `sm`."""
    return SM_COUNT.get(sm, DEFAULT_SM_COUNT)


def shared_memory_limit(sm: int) -> int:
    """Return the bytes of shared memory that one program may use; on an unknown chip the smallest known limit."""
    return SHARED_MEMORY.get(sm, min(SHARED_MEMORY.values()))


@functools.lru_cache
def _cuda_properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def input_precision(dtype: torch.dtype) -> str:
    """Return the precision of a dot; for float32 it is set in `torch.backends.cuda.matmul` (`fp32_precision`)."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
