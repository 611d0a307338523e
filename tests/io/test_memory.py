"""Free memory under the limits of control groups."""

import psutil
import pytest

from gluprune.io import memory


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A function that writes the files of a control group; this process is in `job/task`."""
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text("4:memory:/old\n0::/job/task\n")

    def write(name, limit, used, inactive):
        folder = tmp_path / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 7\n")

    return write


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    found = type("Memory", (), {"available": 10_000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def test_without_control_groups(groups):
    assert memory.available_memory() == 10_000
    groups("job/task", "max", 400, 0)
    assert memory.available_memory() == 10_000


def test_the_tightest_limit_counts(groups):
    groups("job/task", 5000, 3000, 100)
    assert memory.available_memory() == 2100
    groups("job", 4000, 3500, 0)
    assert memory.available_memory() == 500
    groups("", 4000, 4200, 0)  # the root of a container
    assert memory.available_memory() == 0
    groups("", 400_000, 0, 0)
    groups("job", 400_000, 0, 0)
    groups("job/task", 400_000, 0, 0)
    assert memory.available_memory() == 10_000


@pytest.mark.parametrize("damage", ["memory.max", "memory.current", "memory.stat"])
def test_files_that_cannot_be_read(groups, tmp_path, damage):
    groups("job/task", 50, 10, 0)
    (tmp_path / "cgroup/job/task" / damage).unlink()
    assert memory.available_memory() == 10_000
    (tmp_path / "own").unlink()
    assert memory.available_memory() == 10_000
