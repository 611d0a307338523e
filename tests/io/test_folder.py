"""Output folders as containers and clusters give them: mount points, links, file systems that lack something."""

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from gluprune.io import atomic, folder
from gluprune.io.folder import check_destination, complete_folder, partial_folders, remove_partial_folders

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "nested/chat.jinja": b"x"}


def fill(output):
    for name, content in FILES.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(content)


def contents(output):
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def mounted(out, monkeypatch):
    """The empty folder cannot be replaced: renaming onto a mount point fails so."""

    def busy(path, target):
        if Path(target) == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(path, target)

    real = os.rename
    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(atomic, "rename", busy)
    return out


def save(destination, **options):
    with complete_folder(destination, **options) as output:
        fill(output)


def test_a_mount_point_is_written_in_place(mounted):
    save(mounted)
    assert contents(mounted) == FILES
    assert sorted(path.name for path in mounted.parent.iterdir()) == ["out"]


def test_the_config_comes_last(mounted, monkeypatch):
    """Until it is there, nothing takes the folder for a checkpoint."""
    moved, real = [], shutil.move
    monkeypatch.setattr(shutil, "move", lambda a, b: (moved.append(Path(b).name), real(a, b))[1])
    save(mounted)
    assert sorted(moved) == ["config.json", "model.safetensors", "nested"] and moved[-1] == "config.json"


def test_a_failure_in_place_leaves_an_empty_folder(mounted, monkeypatch):
    real = shutil.move

    def full(path, target):
        if Path(target).name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(shutil, "move", full)
        save(mounted)
    assert list(mounted.iterdir()) == []
    save(mounted)
    assert contents(mounted) == FILES


def test_an_interruption_in_place_is_resumed(mounted):
    with pytest.raises(KeyboardInterrupt), complete_folder(mounted, key="1") as output:
        (output / "model.safetensors").write_bytes(b"weights")
        raise KeyboardInterrupt
    (left,) = partial_folders(mounted)
    assert left.parent == mounted and check_destination(mounted) == mounted
    with complete_folder(mounted, key="1", resume=True) as output:
        assert contents(output) == {"model.safetensors": b"weights"}
        fill(output)
    assert contents(mounted) == FILES and partial_folders(mounted) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written(out):
    out.parent.chmod(0o500)
    try:
        save(out)
        assert contents(out) == FILES
        with pytest.raises(OSError, match="is not writable"):
            check_destination(out.parent / "other")
    finally:
        out.parent.chmod(0o700)


def test_a_parent_that_turns_out_to_be_read_only(out, monkeypatch):
    """As root, permissions say nothing, and a file system that is mounted read-only refuses anyway."""
    real = tempfile.mkdtemp

    def mkdtemp(suffix=None, prefix=None, dir=None):
        if Path(dir) == out.parent:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    save(out)
    assert contents(out) == FILES


@pytest.mark.parametrize("destination", ["absent", "absent/too", "out"])
def test_what_cannot_be_written_is_refused_before_any_work(out, monkeypatch, destination):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with (
        pytest.raises(OSError, match=f"the output folder: .* is not writable: .*{destination}"),
        complete_folder(out.parent / destination),
    ):
        pytest.fail("work began")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("key", [None, "1"])
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o2770])
def test_the_mode_of_an_empty_folder_is_kept(out, mode, key):
    """Nobody else reads what is written into a private folder, neither before nor after it is complete."""
    out.chmod(mode)
    with complete_folder(out, key=key) as output:
        assert output.stat().st_mode & 0o7777 == mode
        fill(output)
    assert contents(out) == FILES and out.stat().st_mode & 0o7777 == mode


def test_a_folder_without_permissions_is_written(out):
    out.chmod(0o500)
    save(out)
    assert contents(out) == FILES and out.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_the_owner_of_an_empty_folder_is_kept(out):
    """A private folder of another user would be closed to that user otherwise."""
    out.chmod(0o700)
    os.chown(out, 1234, 2345)
    save(out)
    assert contents(out) == FILES and (out.stat().st_uid, out.stat().st_gid) == (1234, 2345)


def test_a_new_file_system_counts_as_empty(out):
    (out / "lost+found").mkdir()
    save(out)
    assert contents(out) == FILES and (out / "lost+found").is_dir()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(out, exists):
    link = out.parent / "link"
    link.symlink_to(out if exists else out.parent / "new")
    save(link)
    assert link.is_symlink() and contents(link) == FILES
    assert contents(out if exists else out.parent / "new") == FILES


def test_the_working_directory_stays_the_same_folder(out, monkeypatch):
    monkeypatch.chdir(out)
    before = out.stat().st_ino
    save(".")
    assert out.stat().st_ino == before and contents(Path.cwd()) == FILES


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_renames_no_folders(tmp_path, monkeypatch, code):
    def rename(path, target):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic, "rename", rename)
    save(tmp_path / "out")
    assert contents(tmp_path / "out") == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING, "gluprune"):
        save(tmp_path / "out")
    assert contents(tmp_path / "out") == FILES
    assert f"{tmp_path}: no locks on this file system" in caplog.text


def test_a_lock_that_is_held_is_not_a_missing_one(tmp_path):
    with atomic.locked(tmp_path), pytest.raises(ValueError, match="another process"), atomic.locked(tmp_path):
        pytest.fail("two at once")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_folders(tmp_path, monkeypatch, caplog, code):
    real = os.fsync

    def fsync(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(atomic, "fsync", fsync)
    atomic._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "gluprune"):
        save(tmp_path / "out")
        atomic.write_file(tmp_path / "file", [b"1"])
    assert contents(tmp_path / "out") == FILES and caplog.text.count("cannot flush folders") == 1
    monkeypatch.setattr(atomic, "fsync", lambda descriptor: real(12345))
    with pytest.raises(OSError, match="Bad file descriptor: .*file'"):
        atomic.write_file(tmp_path / "file", [b"2"])


def test_advice_that_is_refused(tmp_path, monkeypatch):
    def fadvise(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    monkeypatch.setattr(atomic, "_WRITE_BEHIND", 1)
    atomic.write_file(tmp_path / "file", [b"12", b"34"])
    assert (tmp_path / "file").read_bytes() == b"1234"


def interrupted(destination, key):
    with pytest.raises(KeyboardInterrupt), complete_folder(destination, key=key) as output:
        (output / "shard").write_bytes(b"12345")
        raise KeyboardInterrupt


def test_what_interrupted_runs_left_is_reported_and_cleaned(tmp_path, caplog):
    for name in ("out", "out.2", "o[u]t"):
        interrupted(tmp_path / name, "1")
    first = tmp_path / ".out.1.partial"
    with caplog.at_level(logging.WARNING, "gluprune"):
        interrupted(tmp_path / "out", "1")
        assert caplog.text == ""  # that one is its own
        save(tmp_path / "out", key="2")
    assert f"{first} holds 5 bytes of another run that has not finished" in caplog.text
    with atomic.locked(first), pytest.raises(ValueError, match="another process"):
        remove_partial_folders(tmp_path / "out")
    assert remove_partial_folders(tmp_path / "out") == [first]
    assert remove_partial_folders(tmp_path / "o[u]t") == [tmp_path / ".o[u]t.1.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.2.1.partial", "out"]


def test_the_probe_leaves_nothing(out):
    assert folder._is_replaceable(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"] and list(out.iterdir()) == []
