"""The energy meter with a scripted NVML and a fake powercap tree: counters that wrap, stall or are missing."""

from types import SimpleNamespace

import pynvml
import pytest
import torch

from gluprune.measure import energy
from gluprune.measure.energy import Energy, Meter, NvmlDevice, find_meter, integrate


class ScriptedNVML:
    """Two GPUs with scripted sequences of power (W) and counter readings (mJ); None raises.

    The second can contain a MIG slice. Every access to a GPU is recorded.
    """

    NVMLError = pynvml.NVMLError

    def __init__(self, power=200.0, counters=None, slice_of_second=None, broken=False):
        self.power, self.counters, self.slice_of_second, self.broken = power, counters or {}, slice_of_second, broken
        self.handles = {"GPU-aaaa": "first", "GPU-bbbb": "second"}
        self.asked = []

    def _missing(self):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlInit(self):
        if self.broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if self.slice_of_second and uuid == f"MIG-{self.slice_of_second}":
            return "slice"
        return self.handles[uuid] if uuid in self.handles else self._missing()

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle):
        assert handle == "slice"
        return "second"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.asked.append(handle)
        readings = self.counters.get(handle)
        value = readings.pop(0) if readings else None
        return self._missing() if value is None else value

    def nvmlDeviceGetPowerUsage(self, handle):
        self.asked.append(handle)
        power = self.power() if callable(self.power) else self.power
        return self._missing() if power is None else int(1000 * power)


class Clock:
    """The seconds that a test lets pass: no figure depends on how busy the machine is."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    scripted = Clock()
    monkeypatch.setattr(energy, "time", scripted)
    return scripted


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """Shorten the windows: scripted readings need no real time."""
    monkeypatch.setattr(NvmlDevice, "shortest_window", 0.1)
    monkeypatch.setattr(NvmlDevice, "settling", 0.02)
    monkeypatch.setattr(energy, "SAMPLING_INTERVAL", 0.02)


def measured(nvml, seconds=0.2):
    with Meter(NvmlDevice(nvml, "first")).window() as window:
        energy.time.sleep(seconds)
    return window.energy


def test_counter():
    used = measured(ScriptedNVML(200.0, {"first": [5_000_000, 5_040_000]}))
    assert (used.joules, used.method) == (40.0, "NVML total-energy counter")
    assert 0.2 <= used.seconds < 2
    assert used.cross_check == pytest.approx(200 * used.seconds, rel=0.1)


@pytest.mark.parametrize(
    "readings, complaint",
    [
        ([5_000_000, 5_000_000], "the energy counter did not advance"),
        ([None, None], "NVML has no energy counter here"),
        ([5_000_000, None], "NVML has no energy counter here"),
        ([5_000_000, 1_000], "the energy counter reported"),  # driver reloaded: as a wrapped counter this would be 4 MJ
        ([5_000_000, 5_000_100], "the energy counter reported 0.1 J"),  # stopped after the first tick
    ],
)
def test_a_counter_that_fails_leaves_the_sampled_power(readings, complaint):
    used = measured(ScriptedNVML(200.0, {"first": readings}))
    assert used.joules == pytest.approx(200 * used.seconds, rel=0.1)
    assert used.method.startswith("NVML power sampled every 20 ms (") and complaint in used.method
    assert used.cross_check is None


def test_a_counter_of_32_bits_that_wraps():
    used = measured(ScriptedNVML(200.0, {"first": [2**32 - 15_000, 25_000]}))
    assert (used.joules, used.method) == (pytest.approx(40.0), "NVML total-energy counter")


@pytest.mark.parametrize(
    "readings, complaint",
    [
        ([None, None], "NVML has no energy counter here"),
        ([7, 7], "the energy counter did not advance"),
        ([2**32 - 15_000, 25_000], "the energy counter went backwards"),  # and no power to say whether it wrapped
    ],
)
def test_neither_counter_nor_power_is_not_measured(readings, complaint):
    used = measured(ScriptedNVML(None, {"first": readings}))
    assert used.joules is None
    assert used.method.startswith(f"not measured: {complaint}, and NVML reports no power (")


def test_power_readings_that_stop_in_the_window_are_not_used(monkeypatch):
    """Samples from a part of the window would give only a part of the energy."""
    monkeypatch.setattr(energy, "SAMPLING_INTERVAL", 60.0)  # the test samples
    for counters, expected in [([0, 0], None), ([0, 40_000], 40.0)]:
        readings = iter([200.0, 200.0, None])
        device = NvmlDevice(ScriptedNVML(lambda readings=readings: next(readings), {"first": counters}), "first")
        with Meter(device).window() as window:
            energy.time.sleep(0.2)
            device._sample()
        assert (window.energy.joules, window.energy.cross_check) == (expected, None)


def test_power_is_integrated_as_trapezoids():
    assert integrate([(0.0, 100.0), (1.0, 100.0), (3.0, 300.0)]) == 100 + 400
    assert integrate([(5.0, 100.0)]) == 0


def test_a_window_too_short_for_the_counter_is_not_measured():
    used = measured(ScriptedNVML(200.0, {"first": [0, 1]}), seconds=0.0)
    assert used.joules is None and used.method.startswith("not measured: a window of")


def test_an_error_in_the_window_ends_the_sampling():
    device = NvmlDevice(ScriptedNVML(200.0, {"first": [0, 1]}), "first")
    with pytest.raises(KeyError), Meter(device).window():
        raise KeyError
    assert not device.thread.is_alive()


# --- which GPU ---


def visible(monkeypatch, uuid):
    """Give torch's only visible device this UUID, independently of its index."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))


@pytest.mark.parametrize("uuid", ["bbbb", "GPU-bbbb"])
def test_a_device_masked_by_uuid(monkeypatch, uuid):
    """With CUDA_VISIBLE_DEVICES=GPU-bbbb (or 1), cuda:0 is NVML's second GPU: only that one is accessed."""
    nvml = ScriptedNVML(200.0, {"first": [0, 999_000], "second": [0, 40_000]})
    visible(monkeypatch, uuid)
    with Meter(energy._nvml_source(torch.device("cuda:0"), nvml)).window() as window:
        energy.time.sleep(0.2)
    assert window.energy.joules == 40.0 and set(nvml.asked) == {"second"}


def test_a_mig_slice_is_measured_by_its_gpu_and_says_so(monkeypatch):
    nvml = ScriptedNVML(200.0, {"second": [0, 40_000]}, slice_of_second="cccc")
    visible(monkeypatch, "MIG-cccc")
    with Meter(energy._nvml_source(torch.device("cuda"), nvml)).window() as window:
        energy.time.sleep(0.2)
    assert window.energy.joules == 40.0
    assert window.energy.method == "NVML total-energy counter of the whole GPU, although only a MIG slice was used"


@pytest.mark.parametrize("nvml, uuid", [(ScriptedNVML(), "dddd"), (ScriptedNVML(broken=True), "aaaa")])
def test_a_gpu_that_nvml_does_not_know_is_not_measured(monkeypatch, nvml, uuid):
    visible(monkeypatch, uuid)
    used, runs = Meter(energy._nvml_source(torch.device("cuda"), nvml)).repeat(lambda: None)
    assert (used.joules, runs) == (None, 0)
    assert used.method.startswith(f"not measured: NVML does not find GPU {uuid}: ")


# --- RAPL ---


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two packages, a subdomain of one, and a domain that contains everything."""
    for folder, name, microjoules in [
        ("intel-rapl:0", "package-0", 1_000_000),
        ("intel-rapl:0:0", "dram", 77),
        ("intel-rapl:1", "package-1", 9_000_000),
        ("intel-rapl:2", "psys", 55),
        ("intel-rapl-mmio:0", "package-0", 1_000_000),
    ]:
        domain = tmp_path / folder
        domain.mkdir()
        (domain / "name").write_text(name + "\n")
        (domain / "energy_uj").write_text(f"{microjoules}\n")
        (domain / "max_energy_range_uj").write_text("10000000\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return tmp_path


def test_rapl_sums_packages_and_unwraps(powercap):
    with find_meter("cpu").window() as window:
        energy.time.sleep(0.06)
        (powercap / "intel-rapl:0" / "energy_uj").write_text("3500000")
        (powercap / "intel-rapl:1" / "energy_uj").write_text("1250000")  # 1 J to the end of its range, plus 1.25 J
        (powercap / "intel-rapl:0:0" / "energy_uj").write_text("5000000")
    assert window.energy.joules == pytest.approx(2.5 + 2.25)
    assert window.energy.method == "RAPL, 2 processor packages"


def test_rapl_that_does_not_advance_is_not_measured(powercap):
    with find_meter("cpu").window() as window:
        energy.time.sleep(0.06)
        (powercap / "intel-rapl:0" / "energy_uj").write_text("3500000")
    assert window.energy.joules is None
    assert window.energy.method == "not measured: a RAPL package counter did not advance"


def test_rapl_that_may_not_be_read(powercap, monkeypatch):
    original = type(powercap).read_text

    def guarded(path, *arguments, **options):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(type(powercap), "read_text", guarded)
    used, runs = find_meter("cpu").repeat(lambda: None)
    assert (used.joules, runs) == (None, 0)
    assert used.method == "not measured: RAPL cannot be read: Permission denied (energy_uj)"


def test_rapl_links_that_lead_nowhere(monkeypatch, tmp_path):
    """Docker masks what the links in /sys/class/powercap point to."""
    (tmp_path / "intel-rapl:0").symlink_to("../../devices/virtual/powercap/intel-rapl/intel-rapl:0")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    used, runs = find_meter("cpu").repeat(lambda: None)
    assert (used.joules, runs) == (None, 0)
    assert used.method == "not measured: RAPL cannot be read: No such file or directory (name)"


@pytest.mark.parametrize("missing", ["name", "energy_uj", "max_energy_range_uj"])
@pytest.mark.parametrize("content", [None, "", "x"])
def test_rapl_that_is_half_there_is_not_measured(powercap, missing, content):
    for package in (0, 1):
        file = powercap / f"intel-rapl:{package}" / missing
        file.unlink() if content is None else file.write_text(content)
    used, _ = find_meter("cpu").repeat(lambda: None)
    assert used.joules is None and used.method.startswith("not measured: ")


def test_rapl_that_disappears_in_the_window_is_not_measured(powercap):
    with find_meter("cpu").window() as window:
        energy.time.sleep(0.06)
        (powercap / "intel-rapl:1" / "energy_uj").unlink()
    assert window.energy.joules is None
    assert window.energy.method.startswith("not measured: RAPL cannot be read any more: ")


def test_no_counter_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    meter = find_meter("cpu")
    used, idle = meter.repeat(lambda: pytest.fail("run in vain"))[0], meter.idle(seconds=100)
    assert used.joules is None and used.above(idle) is None
    assert used.method == "not measured: this machine has no RAPL counter of a processor package"
    assert "meta devices" in find_meter("meta").repeat(lambda: None)[0].method


# --- windows ---


def test_work_is_repeated_until_the_window_is_full(powercap):
    """Runs of 10 ms and 0.1 J: the result is the energy per run, for any number of runs."""
    done = []

    def work():
        energy.time.sleep(0.01)
        done.append(1)
        for package in (0, 1):
            counter = powercap / f"intel-rapl:{package}" / "energy_uj"
            counter.write_text(str((int(counter.read_text()) + 50_000) % 10_000_000))

    used, runs = find_meter("cpu").repeat(work, seconds=0.3)
    assert used.seconds >= 0.3 and 1 < runs <= 31 and runs == len(done) - 1  # plus one before the window
    assert used.joules / runs == pytest.approx(0.1)
    used, runs = find_meter("cpu").repeat(work, seconds=0)  # not shorter than the counter's resolution
    assert used.seconds >= 0.05 and used.joules / runs == pytest.approx(0.1)


def test_idle_is_subtracted_by_time():
    used, idle = Energy(100.0, 2.0, "counter"), Energy(60.0, 3.0, "counter")
    assert used.above(idle) == 100 - 20 * 2
    assert used.above(Energy(None, 3.0, "not measured")) is None
    assert Energy(None, 2.0, "not measured").above(idle) is None


@pytest.mark.cuda
def test_counter_and_integrated_power_agree_on_a_gpu(monkeypatch):
    """Within 3 %, over five seconds of large products."""
    monkeypatch.undo()
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def work():
        for _ in range(20):
            weight @ weight
        torch.cuda.synchronize()

    used, runs = find_meter("cuda").repeat(work, seconds=5)
    if not used.method.startswith("NVML total-energy counter"):
        pytest.skip(used.method)
    assert runs > 1 and used.joules == pytest.approx(used.cross_check, rel=0.03)
