"""Crash-safe files and folders: each gets its final name only when all of it is on disk."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# The three system calls that the safety of a checkpoint depends on, named here so that tests can make each of them
# fail.
write, fsync, rename = os.write, os.fsync, os.rename

# After this many bytes of a file, flushing starts, so that there is little to wait for at the end.
_WRITE_BEHIND = 1 << 25


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file name to errors from calls on a file descriptor, which lack it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file's data, or a folder's list of names, to the disk."""
    with _descriptor(path, os.O_RDONLY) as descriptor, _naming(path):
        fsync(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _start_flushing(descriptor: int, first: int, end: int) -> None:
    """Start flushing written bytes of a file, without waiting. Only `fsync` makes them safe."""
    if hasattr(os, "posix_fadvise"):  # not on macOS; Linux starts to flush pages that will not be needed
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


def read_chunks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """Yield the content of a file in pieces of at most `size` bytes."""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(size):
            yield chunk


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the lock ends when the process ends, for whatever reason.

    Raises:
        ValueError: Another process holds the lock.
    """
    with _descriptor(folder, os.O_RDONLY) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}") from None
        yield


def check_destination(destination: str | Path) -> Path:
    """Return the destination as a path, if a folder may be written there.

    Raises:
        ValueError: It exists and is not an empty folder.
    """
    destination = Path(destination)
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"output {destination} exists and is not a folder")
    if destination.is_dir() and any(destination.iterdir()):
        raise ValueError(f"output folder {destination} exists and is not empty")
    return destination


@contextmanager
def complete_folder(destination: str | Path, key: str | None = None, resume: bool = False) -> Iterator[Path]:
    """Yield a folder that gets the destination's name when the block succeeds and everything is on disk.

    The output folder is either absent (or the empty folder that was there) or complete. Until then, the folder is
    inside a work folder next to the destination. Other files that the block writes into the work folder do not reach
    the destination.

    Args:
        destination: A folder that does not exist or is empty.
        key: Identifies what is written. With a key, finished files are kept after an interruption or an OSError, so
            that a later call can continue.
        resume: Yield the folder that an earlier call with this key left, instead of an empty one.

    Raises:
        ValueError: The destination exists and is not empty, or another process is writing the same.
        OSError: Names the file or folder that could not be written.
    """
    destination = check_destination(destination).absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix, suffix = f".{destination.name}.", ".partial"
    if key is None:
        work = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=destination.parent))
    else:
        work = destination.with_name(prefix + key + suffix)
        work.mkdir(exist_ok=True)
    with locked(work):
        if not resume:
            for left in work.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        folder = work / "checkpoint"
        folder.mkdir(exist_ok=True)
        try:
            yield folder
            sync_tree(folder)
            rename(folder, destination)
        except BaseException as error:
            # A ValueError (a corrupt source, for example) would occur again; a full disk or an interruption may not.
            is_final = key is None or isinstance(error, ValueError)
            if is_final or not any(path.is_file() for path in work.rglob("*")):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work)
        sync(destination.parent)
