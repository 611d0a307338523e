"""Output folders that appear only when they are complete, also where the file system makes that hard."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gluprune.io import atomic

logger = logging.getLogger(__name__)

_SUFFIX = ".partial"
# What a new ext4 file system holds.
_NO_CONTENT = ("lost+found",)
# Without this file, nothing takes a folder for a checkpoint.
_LAST = "config.json"
# The destination is a mount point, or the file system cannot rename folders.
_NOT_RENAMED = (errno.EBUSY, errno.EXDEV, errno.ENOSYS, errno.ENOTSUP)


def check_outside(destination: str | Path, *sources: str | Path) -> None:
    """Check that the destination does not lie in one of the folders that are read; Hub ids lie elsewhere.

    Raises:
        ValueError: It does.
    """
    resolved = Path(destination).resolve()
    for source in sources:
        if Path(source).is_dir() and Path(source).resolve() in (resolved, *resolved.parents):
            raise ValueError(f"output folder {destination} must lie outside the source {source}")


def check_destination(destination: str | Path) -> Path:
    """Return the destination as an absolute path without links, if a folder may be written there.

    Raises:
        ValueError: It exists and is not an empty folder. What interrupted runs left in it does not count.
        OSError: Neither it nor its parent can be written to.
    """
    resolved = Path(destination).resolve()
    if resolved.exists() and not resolved.is_dir():
        raise ValueError(f"output {destination} exists and is not a folder")
    if resolved.is_dir() and _content(resolved):
        raise ValueError(f"output folder {destination} exists and is not empty: remove it, or choose another")
    existing = next(path for path in (resolved, *resolved.parents) if path.exists())
    places = {existing, resolved.parent} if existing == resolved else {existing}
    if existing.is_dir() and not any(os.access(place, os.W_OK | os.X_OK) for place in places):
        raise OSError(errno.EACCES, f"cannot write the output folder: {existing} is not writable", str(destination))
    return resolved


def _content(folder: Path) -> list[Path]:
    """Return what a folder holds, without what interrupted runs left."""
    partial = partial_folders(folder)
    return [path for path in folder.iterdir() if path.name not in _NO_CONTENT and path not in partial]


def folder_state(folder: Path) -> list:
    """Return what changes with the files of a folder: its path, and the name, size and time of each file."""
    files = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
    return [str(folder), [(name, state.st_size, state.st_mtime_ns) for name, state in files]]


def partial_folders(destination: str | Path) -> list[Path]:
    """Return the folders that interrupted runs to this destination left, next to it or in it."""
    destination = Path(destination).resolve()
    # Keys have no dot: `.out.2.<key>.partial` belongs to `out.2`, not to `out`.
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.[^.]+{re.escape(_SUFFIX)}")
    found: list[Path] = []
    for place in (destination.parent, destination):
        with suppress(OSError):
            found += (path for path in place.iterdir() if pattern.fullmatch(path.name) and path.is_dir())
    return sorted(found)


def remove_partial_folders(destination: str | Path) -> list[Path]:
    """Remove the folders that interrupted runs to this destination left, and return them.

    Raises:
        ValueError: Another process is writing to one.
    """
    found = partial_folders(destination)
    for folder in found:
        with atomic.locked(folder):
            shutil.rmtree(folder)
    return found


@contextmanager
def complete_folder(
    destination: str | Path, key: str | None = None, resume: bool = False, *, in_stages: bool = False
) -> Iterator[Path]:
    """Yield a folder that gets the destination's name when the block succeeds and everything is on disk.

    The output folder is either absent (or the empty folder that was there, whose owner and mode are kept) or complete.
    Until then, the folder is inside a work folder next to the destination. Other files that the block writes into the
    work folder do not reach the destination.

    An empty folder that cannot be replaced (a mount point, the working directory, or one whose parent cannot be written
    to) holds the work folder itself. At the end, the files are moved up, `config.json` last.

    Args:
        destination: A folder that does not exist or is empty, or a link to one.
        key: Identifies what is written. With a key, finished files are kept after an interruption or an OSError, so
            that a later call can continue.
        resume: Yield the folder that an earlier call with this key left, instead of an empty one.
        in_stages: Whether finished files are results of stages, which are right whatever happens later: they are kept
            after a ValueError as well.

    Raises:
        ValueError: The destination exists and is not empty, or another process is writing the same.
        OSError: Names the file or folder that could not be written.
    """
    destination = check_destination(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    place = destination.parent if _is_replaceable(destination) else destination
    prefix = f".{destination.name}."
    if key is None:
        work = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=place))
    else:
        work = place / (prefix + key + _SUFFIX)
        work.mkdir(exist_ok=True)
    _report_others(destination, work)
    with atomic.locked(work):
        if not resume:
            for left in work.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        folder = work / "checkpoint"
        folder.mkdir(exist_ok=True)
        if place != destination and destination.exists():
            _copy_access(destination, folder)
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IRWXU)
        try:
            yield folder
            atomic.sync_tree(folder)
            if place == destination:
                _move_into(folder, destination)
            else:
                _rename(folder, destination)
        except BaseException as error:
            # A ValueError (a corrupt source, for example) would occur again; a full disk or an interruption may not.
            is_final = key is None or (isinstance(error, ValueError) and not in_stages)
            if is_final or not any(path.is_file() for path in work.rglob("*")):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work)
        atomic.sync(place)


def _is_replaceable(destination: Path) -> bool:
    """Whether a folder can get the destination's name: it is absent, or an empty folder gives way to another."""
    if not destination.exists():
        return True
    with suppress(OSError):
        if destination.samefile(Path.cwd()):
            return False  # it would leave the user in a deleted folder
    probe = None
    try:
        probe = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        _copy_access(destination, probe)
        probe.rename(destination)
    except OSError:
        if probe is not None:
            probe.rmdir()
        return False
    return True


def _copy_access(source: Path, folder: Path) -> None:
    """Give a folder the owner and mode of another one."""
    state = source.stat()
    with suppress(OSError):  # only root may give folders away
        os.chown(folder, state.st_uid, state.st_gid)
    folder.chmod(stat.S_IMODE(state.st_mode))


def _report_others(destination: Path, own: Path) -> None:
    """Log what interrupted runs to the same destination left."""
    for folder in partial_folders(destination):
        if folder != own:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            logger.warning(
                "%s holds %s bytes of another run that has not finished; if it was interrupted, remove the folder"
                " (`gluprune prune --clean` does)",
                folder,
                f"{size:,}",
            )


def _rename(folder: Path, destination: Path) -> None:
    try:
        atomic.rename(folder, destination)
    except OSError as error:
        if error.errno not in _NOT_RENAMED:
            raise
        destination.mkdir(exist_ok=True)
        _move_into(folder, destination)


def _move_into(folder: Path, destination: Path) -> None:
    """Move the files of a folder into another, `config.json` last; if that fails, none of them stays there."""
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == _LAST)
    moved = []
    try:
        for name in names:
            if name == _LAST:
                _sync_all(moved)
            moved.append(destination / name)
            shutil.move(folder / name, destination / name)
        _sync_all(moved)
    except BaseException:
        for path in moved:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        raise


def _sync_all(paths: list[Path]) -> None:
    """Flush the entries of a folder, and the list of their names."""
    for path in paths:
        atomic.sync_tree(path)
    for folder in {path.parent for path in paths}:
        atomic.sync(folder)
