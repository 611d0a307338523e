"""Energy of a piece of work: NVML on a GPU, RAPL on a CPU, and "not measured", never 0, if neither can be read.

    meter = find_meter(model.device)
    idle = meter.idle(seconds=10)
    energy, runs = meter.repeat(work, seconds=5)
    energy.joules / runs, energy.above(idle), energy.method

Counters are updated every few milliseconds (RAPL) to a tenth of a second (NVML), so windows must last seconds: `repeat`
repeats the work until a window is full. The work must wait for its kernels. NVML counts the whole GPU, including other
processes, and its power reading lags by up to a second; RAPL counts whole processor packages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import pynvml
import torch

POWERCAP = Path("/sys/class/powercap")
SAMPLING_INTERVAL = 0.05  # seconds


@dataclass(frozen=True)
class Energy:
    """Energy of one window.

    Attributes:
        joules: Total energy that the device used. None: not measured.
        seconds: Length of the window.
        method: How it was measured, or why it was not.
        cross_check: Joules by a second method, where there is one.
    """

    joules: float | None
    seconds: float
    method: str
    cross_check: float | None = None

    def above(self, idle: Energy) -> float | None:
        """Return the joules beyond those of the device at rest in the same time; None where either was not measured."""
        if self.joules is None or idle.joules is None:
            return None
        return self.joules - idle.joules / idle.seconds * self.seconds


class EnergySource(Protocol):
    """The source that a meter reads.

    Attributes:
        shortest_window: Seconds that a window must last for the source's resolution. None: nothing can be read.
        settling: Seconds of work before a window, until readings reflect it.
    """

    shortest_window: float | None
    settling: float

    def start(self) -> None:
        """Begin a window."""
        ...

    def stop(self) -> tuple[float | None, str, float | None]:
        """Return the joules since `start`, the method, and joules by a second method."""
        ...


class Meter:
    """Measures the energy of windows of work on one device."""

    def __init__(self, source: EnergySource):
        self.source = source

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Measure a `with` block; the window holds the energy afterwards."""
        window = Window()
        self.source.start()
        start = time.perf_counter()
        try:
            yield window
        finally:
            seconds = time.perf_counter() - start
            joules, method, cross_check = self.source.stop()
            shortest = self.source.shortest_window
            if shortest is not None and seconds < shortest:
                joules, cross_check = None, None
                method = f"not measured: a window of {seconds:.3g} s is too short, {shortest:g} s are needed"
            window.energy = Energy(joules, seconds, method, cross_check)

    def idle(self, seconds: float = 10.0) -> Energy:
        """Measure the device at rest: nothing must run on it."""
        with self.window() as window:
            if self.source.shortest_window is not None:
                time.sleep(seconds)
        return window.energy

    def repeat(self, work: Callable[[], object], seconds: float = 5.0) -> tuple[Energy, int]:
        """Repeat `work` for a window of at least `seconds`, after running it long enough for the readings to settle.

        Args:
            work: The work; it must wait for its kernels.
            seconds: Shortest window.

        Returns:
            The energy of the window, and the number of runs in it: 0 where nothing can be read.
        """
        if self.source.shortest_window is None:
            with self.window() as window:
                pass
            return window.energy, 0
        _repeat_for(work, self.source.settling)
        with self.window() as window:
            runs = _repeat_for(work, max(seconds, self.source.shortest_window))
        return window.energy, runs


class Window:
    """A measured block of code."""

    energy: Energy


def _repeat_for(work: Callable[[], object], seconds: float) -> int:
    end, runs = time.perf_counter() + seconds, 0
    while runs == 0 or time.perf_counter() < end:
        work()
        runs += 1
    return runs


class Unmetered:
    """A source for devices without a counter."""

    shortest_window: float | None = None
    settling: float = 0.0

    def __init__(self, reason: str):
        self.reason = reason

    def start(self) -> None:
        """See `EnergySource`."""

    def stop(self) -> tuple[None, str, None]:
        """See `EnergySource`."""
        return None, f"not measured: {self.reason}", None


class RaplPackages:
    """The energy counters of processor packages in Linux' powercap, each of which wraps at its own range."""

    shortest_window: float | None = 0.05
    settling: float = 0.0

    def __init__(self, domains: Sequence[Path]):
        self.domains = domains
        self.ranges = [int((domain / "max_energy_range_uj").read_text()) for domain in domains]

    def _read(self) -> list[int]:
        return [int((domain / "energy_uj").read_text()) for domain in self.domains]

    def start(self) -> None:
        """See `EnergySource`."""
        self.before = self._read()

    def stop(self) -> tuple[float | None, str, None]:
        """See `EnergySource`."""
        try:
            now = self._read()
        except (OSError, ValueError) as error:
            return None, f"not measured: RAPL cannot be read any more: {error}", None
        moved = [(after - before) % span for before, after, span in zip(self.before, now, self.ranges, strict=True)]
        if not all(moved):
            return None, "not measured: a RAPL package counter did not advance", None
        return sum(moved) / 1e6, f"RAPL, {len(moved)} processor package{'s' if len(moved) > 1 else ''}", None


class NvmlDevice:
    """One GPU: its total-energy counter, and sampled power where the counter fails."""

    shortest_window: float | None = 2.0
    settling: float = 1.0

    def __init__(self, nvml, handle, note: str = ""):
        """Args: `nvml`: the module `pynvml` or an equivalent; `note`: added to the method."""
        self.nvml, self.handle, self.note = nvml, handle, note

    def _counter(self) -> float | None:
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
        except self.nvml.NVMLError:
            return None

    def _sample(self) -> None:
        try:
            watts = self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1e3
            self.samples.append((time.perf_counter(), watts))
        except self.nvml.NVMLError as error:
            self.lost = str(error)
            self.done.set()

    def _keep_sampling(self) -> None:
        while not self.done.wait(SAMPLING_INTERVAL):
            self._sample()

    def start(self) -> None:
        """See `EnergySource`."""
        self.samples: list[tuple[float, float]] = []
        self.lost: str | None = None
        self.done = threading.Event()
        self._sample()
        self.thread = threading.Thread(target=self._keep_sampling, daemon=True)
        self.thread.start()
        self.before = self._counter()

    def stop(self) -> tuple[float | None, str, float | None]:
        """See `EnergySource`."""
        after = self._counter()
        self.done.set()
        self.thread.join()
        if self.lost is None:
            self._sample()
        sampled = integrate(self.samples) if self.lost is None else None
        counted, complaint = _counted(self.before, after, sampled)
        if counted is not None:
            return counted, "NVML total-energy counter" + self.note, sampled
        if sampled is not None:
            return sampled, f"NVML power sampled every {1e3 * SAMPLING_INTERVAL:.0f} ms ({complaint}){self.note}", None
        return None, f"not measured: {complaint}, and NVML reports no power ({self.lost})", None


def _counted(before: float | None, after: float | None, sampled: float | None) -> tuple[float | None, str]:
    """Joules between two readings of a counter (also in joules), or the reason why they are unusable."""
    if before is None or after is None:
        return None, "NVML has no energy counter here"
    if after == before:
        return None, "the energy counter did not advance"
    # Lower than before: a 32-bit counter (of millijoules) has wrapped, or the driver was reloaded. Use sampled power
    # instead.
    joules = after - before if after > before else after - before + 2**32 / 1e3
    if sampled is None:
        return (joules, "") if after > before else (None, "the energy counter went backwards")
    if not 0.5 * sampled < joules < 2 * sampled:
        return None, f"the energy counter reported {joules:.4g} J"
    return joules, ""


def integrate(samples: Sequence[tuple[float, float]]) -> float:
    """Return the joules under samples of (seconds, watts), by the trapezoid rule."""
    return sum((later - earlier) * (low + high) / 2 for (earlier, low), (later, high) in pairwise(samples))


def find_meter(device: torch.device) -> Meter:
    """Return the meter of a device; where nothing can be read, `Energy.method` says why."""
    device = torch.device(device)
    if device.type == "cuda":
        return Meter(_nvml_source(device, pynvml))
    if device.type == "cpu":
        return Meter(_rapl_source(POWERCAP))
    return Meter(Unmetered(f"no energy counter is known for {device.type} devices"))


def _nvml_source(device: torch.device, nvml) -> EnergySource:
    """NVML's view of the device that torch uses.

    NVML numbers all GPUs of the machine in bus order; torch numbers those in CUDA_VISIBLE_DEVICES, in the order given
    there or the fastest first. The UUID is the same in every numbering and under every mask.
    """
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")).removeprefix("GPU-").removeprefix("MIG-")
    try:
        nvml.nvmlInit()
        handle, is_slice = _handle(nvml, uuid)
    except nvml.NVMLError as error:
        return Unmetered(f"NVML does not find GPU {uuid}: {error}")
    return NvmlDevice(nvml, handle, " of the whole GPU, although only a MIG slice was used" if is_slice else "")


def _handle(nvml, uuid: str) -> tuple[object, bool]:
    """The handle of the GPU with a UUID, and whether the UUID is that of a slice of it (which has no counter)."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), False
    except nvml.NVMLError:
        instance = nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance), True


def _rapl_source(root: Path) -> EnergySource:
    """Domains `intel-rapl:N` (also on AMD) that are packages: other domains are parts of these or hold them."""
    try:
        domains = sorted(root.glob("intel-rapl:*"))
        packages = [domain for domain in domains if (domain / "name").read_text().startswith("package")]
        if not packages:
            return Unmetered("this machine has no RAPL counter of a processor package")
        source = RaplPackages(packages)
        source.start()
    except (OSError, ValueError) as error:  # in a container, links may lead nowhere, and files may be empty
        place = f" ({Path(error.filename).name})" if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) else error
        return Unmetered(f"RAPL cannot be read: {reason}{place}")
    return source
