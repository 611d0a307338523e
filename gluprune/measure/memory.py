"""Peak memory of a process and of a model's work."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch


def resident(field: str) -> int:
    """Return a field of `/proc/self/status` in bytes.

    Args:
        field: VmRSS, the resident memory of this process, or VmHWM, its peak. Unlike getrusage's maximum, VmHWM does
            not start from the peak of the parent process.

    Raises:
        OSError: There is no such file.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = re.search(rf"{field}:\s+(\d+) kB", status)
    if kilobytes is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(kilobytes[1])


class PeakMemory:
    """Peak memory of a model and its work.

    On CUDA, the peak of the allocator since this object was created. On a CPU, the weights plus the growth of the
    process in one more run; memory that the process took earlier for other things, such as compiling, is not counted.

    Args:
        model: On the device to measure.
    """

    def __init__(self, model):
        self.model, self.device = model, model.device
        torch.compiler.reset()  # compiled steps and reference cycles hold models and caches that were measured before
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self, work: Callable[[], object]) -> tuple[int | None, str]:
        """Return the bytes, or None where they cannot be read, and the method."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), "most that torch's CUDA allocator held"
        try:
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
            work()
            grown = max(0, resident("VmHWM") - before)
        except OSError as error:
            return None, f"not measured: the peak of the process cannot be read ({error.strerror})"
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        return weights + grown, "weights, and growth of resident memory in a run"
