"""Crash-safe files: each gets its final name only when all of it is on disk."""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

# The three system calls that the safety of a checkpoint depends on, named here so that tests can make each of them
# fail.
write, fsync, rename = os.write, os.fsync, os.rename

# How file systems say that they lack an operation on a folder.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

# After this many bytes of a file, flushing starts, so that there is little to wait for at the end.
_WRITE_BEHIND = 1 << 25


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file name to errors from calls on a file descriptor, which lack it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_space(folder: Path, needed: int) -> None:
    """Check that a file system has room for so many bytes.

    Raises:
        OSError: It has less.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, only {free:,} are free", str(folder))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file's data, or a folder's list of names, to the disk.

    Some file systems (FUSE, SMB) cannot flush folders; there, a warning is logged.
    """
    with _descriptor(path, os.O_RDONLY) as descriptor, _naming(path):
        try:
            fsync(descriptor)
        except OSError as error:
            if error.errno not in _UNSUPPORTED or not path.is_dir():
                raise
            _warn_once("the file system cannot flush folders: after a power cut, output may be incomplete")


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _start_flushing(descriptor: int, first: int, end: int) -> None:
    """Start flushing written bytes of a file, without waiting. Only `fsync` makes them safe."""
    if hasattr(os, "posix_fadvise"):  # not on macOS; Linux starts to flush pages that will not be needed
        with suppress(OSError):  # only advice
            os.posix_fadvise(descriptor, first, end - first, os.POSIX_FADV_DONTNEED)


def write_file(
    path: Path, chunks: Iterable[bytes | memoryview], progress: Callable[[int], object] | None = None
) -> None:
    """Write chunks to a file that gets its name when all of them are on disk.

    Args:
        path: The final name. A file of that name is replaced; missing folders are created.
        chunks: Consecutive bytes.
        progress: Called with the size of every chunk after it was written.

    Raises:
        OSError: Names the file; nothing that was written remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with _descriptor(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            written = started = 0
            for chunk in chunks:
                rest = memoryview(chunk).cast("B")
                with _naming(path):
                    while rest.nbytes:
                        rest = rest[write(descriptor, rest) :]
                written += len(chunk)
                if written - started >= _WRITE_BEHIND:
                    _start_flushing(descriptor, started, written)
                    started = written
                if progress:
                    progress(len(chunk))
            with _naming(path):
                fsync(descriptor)
        rename(unfinished, path)
        sync(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def link_file(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; copy it where the file system has no hard links, or the file is on another one."""
    try:
        Path(target).hardlink_to(Path(source).resolve())
    except OSError:
        write_file(Path(target), read_chunks(Path(source)))


def read_chunks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """Yield the content of a file in pieces of at most `size` bytes."""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(size):
            yield chunk


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the lock ends when the process ends, for whatever reason.

    On file systems without locks (Lustre without the mount option `flock`, NFS, FUSE) a warning is logged instead.

    Raises:
        ValueError: Another process holds the lock.
    """
    with _descriptor(folder, os.O_RDONLY) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}") from None
        except OSError as error:
            reason = f"no locks on this file system ({error.strerror})"
            _warn_once(f"{folder.parent}: {reason}; make sure that no other process writes the same output")
        yield
