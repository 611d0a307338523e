"""Files that survive: a file or folder has its final name only when all of it is on the disk."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# The three system calls that a checkpoint's life depends on, named here so that tests can make each of them fail.
write, fsync, rename = os.write, os.fsync, os.rename


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Calls on a file descriptor raise errors without a file name; add it."""
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


def write_file(
    path: Path, chunks: Iterable[bytes | memoryview], progress: Callable[[int], object] | None = None
) -> None:
    """Write chunks to a file that takes its name when all of them are on the disk.

    Args:
        path: the final name; a file of that name is replaced, folders on the way are made.
        chunks: consecutive bytes.
        progress: called with the size of every chunk that has been written.

    Raises:
        OSError: names the file; nothing is left of what was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with _descriptor(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            for chunk in chunks:
                rest = memoryview(chunk).cast("B")
                with _naming(path):
                    while rest.nbytes:
                        rest = rest[write(descriptor, rest) :]
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
    """The content of a file in pieces of at most `size` bytes."""
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(size):
            yield chunk


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock ends with the process, however that ends.

    Raises:
        ValueError: another process holds it.
    """
    with _descriptor(folder, os.O_RDONLY) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}") from None
        yield
