"""Pruning on disk: failing system calls, full disks, interruptions."""

import errno
import json
import os
import resource
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from gluprune.checkpoints import write
from gluprune.checkpoints.load_save import save
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io import atomic
from gluprune.io.folder import complete_folder
from tests.helpers.streaming import contents
from tests.helpers.streaming_faults import ARGUMENTS, make_source


@pytest.fixture
def expected(source, tmp_path):
    """The output of a run without faults."""
    prune_checkpoint(source, tmp_path / "expected", **ARGUMENTS)
    result = contents(tmp_path / "expected")
    shutil.rmtree(tmp_path / "expected")
    return result


class FaultyCalls:
    """Counts the calls of `files.write`, `files.fsync` and `files.rename` and makes one of them fail.

    Nothing is actually flushed: that would take most of the time, and only a power cut would show the difference.
    """

    def __init__(self, patch, fail_at=None, error=None):
        self.log, self.lock = [], threading.Lock()
        for name, call in {"write": os.write, "fsync": lambda descriptor: None, "rename": os.rename}.items():
            patch.setattr(atomic, name, self.wrap(name, call, fail_at, error))

    def wrap(self, name, call, fail_at, error):
        def faulty(*arguments):
            place = arguments[0]
            with self.lock:
                self.log.append((name, os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else str(place)))
                number = len(self.log)
            if number == fail_at:
                if name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])  # a full disk accepts a part
                raise error
            if name == "write":
                return call(arguments[0], arguments[1][:1500])  # calls may write less than they were given
            return call(*arguments)

        return faulty


def in_order(patch):
    """Use small blocks and no read-ahead, so that every run makes the same calls in the same order."""
    patch.setattr(write, "_BLOCK_BYTES", 700)
    patch.setattr(write, "_ahead", lambda items, *_: items)


@pytest.fixture
def calls(source, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        in_order(patch)
        calls = FaultyCalls(patch)
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert contents(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")
    return calls.log


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fault_at_every_call(source, expected, calls, tmp_path):
    before, out = contents(source), tmp_path / "out"
    error = OSError(errno.ENOSPC, "No space left on device")
    assert {name for name, _ in calls} == {"write", "fsync", "rename"} and len(calls) > 60
    for fail_at in range(1, len(calls) + 1):
        with pytest.MonkeyPatch.context() as patch:
            in_order(patch)
            faulty = FaultyCalls(patch, fail_at, error)
            with pytest.raises(OSError) as raised:
                prune_checkpoint(source, out, **ARGUMENTS)
        assert len(faulty.log) == fail_at and faulty.log == calls[:fail_at]
        if calls[fail_at - 1][0] != "rename":
            path = calls[fail_at - 1][1].removesuffix(".unfinished")
            assert str(raised.value) == f"[Errno {errno.ENOSPC}] No space left on device: {path!r}"
        assert contents(source) == before
        if out.exists():  # only the last flush, after the rename, fails too late to undo the output
            assert contents(out) == expected and fail_at == len(calls)
        else:
            assert not list(tmp_path.rglob("*.unfinished"))
            with pytest.MonkeyPatch.context() as patch:
                FaultyCalls(patch)
                prune_checkpoint(source, out, resume=True, **ARGUMENTS)
            assert contents(out) == expected
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
        shutil.rmtree(out)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interruption_while_reading_ahead(source, expected, calls, tmp_path):
    """The same with the read-ahead thread, where the order of calls is not fixed."""
    for fail_at in range(1, len(calls), 4):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(write, "_BLOCK_BYTES", 700)
            FaultyCalls(patch, fail_at, KeyboardInterrupt())
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
        assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.unfinished"))
        prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
        assert contents(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_everything_is_flushed_before_it_is_renamed(calls, source):
    """The order that survives a power cut: write, flush, rename, flush the folder; then the same for the output."""
    for (name, path), following in zip(calls, [*calls[1:], None]):
        if name == "rename":  # a finished shard must not outlive the selection that it was written with
            parent = Path(path).parents[1] if path.endswith("checkpoint") else Path(path).parent
            assert following == ("fsync", str(parent))

    dirty = {}  # file or folder -> changes since its last flush
    for name, path in calls:
        if name == "fsync":
            dirty.pop(path, None)
        elif name == "write":
            dirty[path] = "written"
        else:
            assert path not in dirty, f"{path} is renamed before it is flushed"
            assert not [p for p in dirty if p.startswith(path + "/")], f"{path} is renamed before its content"
            dirty[str(Path(path).parent)] = "renamed into"
    folders_gone = {path for path in dirty if ".partial" in path}
    assert set(dirty) == folders_gone, "not flushed at the end"
    assert calls[-1][0] == "fsync"
    assert sum(name == "rename" and path.endswith("checkpoint") for name, path in calls) == 1


def test_resume_keeps_finished_shards(source, expected, tmp_path, monkeypatch):
    names = sorted(name for name in expected if name.endswith(".safetensors"))
    assert len(names) >= 4
    real, written = atomic.write_file, []

    def write_file(path, chunks, progress=None):
        if path.name == names[2]:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, chunks, progress)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", write_file)
        with pytest.raises(OSError, match="No space left"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    (partial,) = tmp_path.glob(".out.*.partial")
    assert sorted(contents(partial / "checkpoint")) == names[:2]

    # Another recipe does not use them; its failure does not remove them.
    prune_checkpoint(source, tmp_path / "other", resume=True, intermediate_size=21, multiple_of=1)
    assert contents(tmp_path / "other").keys() == expected.keys() and contents(tmp_path / "other") != expected

    # A different file with a shard's name is not used.
    (partial / "checkpoint" / names[1]).write_bytes(b"\0" * len(expected[names[1]]))
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", lambda path, *rest: (written.append(path.name), real(path, *rest))[1])
        report = prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
    assert names[0] not in written and set(names[1:]) <= set(written)
    assert contents(tmp_path / "out") == expected
    assert {layer: len(kept) for layer, kept in report.kept.items()} == {0: 20, 1: 20}
    assert not partial.exists()


@contextmanager
def without_the_last_rename():
    def rename(path, target):
        if Path(path).name == "checkpoint":
            raise KeyboardInterrupt
        os.rename(path, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "rename", rename)
        yield


def test_without_resume_nothing_is_reused(source, expected, tmp_path):
    with without_the_last_rename():
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    (partial,) = tmp_path.glob(".out.*.partial")
    assert contents(partial / "checkpoint") == expected
    # The files look complete, but their content is wrong.
    for file in (partial / "selections").iterdir():
        file.write_text(json.dumps({layer: list(range(20)) for layer in (0, 1)}))
    for file in (partial / "checkpoint").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-2] + b"??")
    (partial / "checkpoint" / "other").mkdir()
    prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert contents(tmp_path / "out") == expected


def test_resume_keeps_the_stored_selection(source, expected, tmp_path):
    """Finished and remaining shards must use the same selection, so no layer is scored twice."""
    with without_the_last_rename():
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    (partial,) = tmp_path.glob(".out.*.partial")
    other = list(range(20))
    for file in (partial / "selections").iterdir():
        saved = json.loads(file.read_text())
        file.write_text(json.dumps({layer: other if layer == "1" else kept for layer, kept in saved.items()}))
    shutil.rmtree(partial / "checkpoint")
    report = prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
    assert report.kept[1].tolist() == other and report.kept[0].tolist() != other


def test_two_runs_do_not_mix(source, tmp_path):
    with without_the_last_rename():
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    (partial,) = tmp_path.glob(".out.*.partial")
    with atomic.locked(partial), pytest.raises(ValueError, match="another process is writing"):
        prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_is_detected(source, tmp_path, monkeypatch):
    real, shard = atomic.write_file, max(source.glob("*.safetensors"))

    def touch(path, *rest):
        real(path, *rest)
        os.utime(shard, ns=(1, 1))

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", touch)
        with pytest.raises(ValueError, match="changed while it was read"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]

    def truncate(path, *rest):
        os.truncate(shard, shard.stat().st_size - 1)
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", truncate)
        with pytest.raises(ValueError, match=f"{shard.name} ends within tensor"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_full_disk(source, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
        with pytest.raises(OSError, match=r"bytes are needed, only 10 are free"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]

    # The kernel returns an error in the middle of a file.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*safetensors'"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.unfinished"))
    prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
    assert contents(tmp_path / "out") == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that root cannot write to")
def test_a_folder_that_cannot_be_written(source, tmp_path):
    with pytest.raises(OSError, match="/proc/gluprune"):
        prune_checkpoint(source, "/proc/gluprune/out", **ARGUMENTS)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        prune_checkpoint(source, tmp_path / "file" / "out", **ARGUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]


def test_a_file_gets_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "folder" / "file"

    def chunks(expected):
        for number in range(3):
            assert (path.read_bytes() if path.exists() else None) == expected
            yield bytes([number]) * 10

    atomic.write_file(path, chunks(None))
    whole = b"".join(bytes([number]) * 10 for number in range(3))
    path.write_bytes(b"old")
    atomic.write_file(path, chunks(b"old"))
    assert contents(tmp_path) == {"folder/file": whole}


def test_saving_a_model_leaves_nothing_behind(tmp_path, monkeypatch):
    """`save` uses the same writer, but keeps nothing for a second attempt."""
    model = LlamaForCausalLM.from_pretrained(make_source(tmp_path / "source"))
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            save(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    with monkeypatch.context() as patch:
        calls = FaultyCalls(patch)
        with complete_folder(tmp_path / "out") as folder:
            (folder / "weights").write_bytes(b"1")
    flushed = [Path(path).name for name, path in calls.log if name == "fsync"]
    assert flushed == ["weights", "checkpoint", tmp_path.name]
    assert [name for name, _ in calls.log] == ["fsync", "fsync", "rename", "fsync"]
