"""Files and folders that are written completely or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import lock_descriptor
from safetensors import SafetensorError

from qlora.errors import CheckpointError


@contextmanager
def atomic_folder(target: Path, error: type[Exception] = CheckpointError, needed: int = 0) -> Iterator[Path]:
    """Context that yields a folder next to `target` to write into; on exit it is synced and replaces the target.

    If anything fails, the new folder is removed and the old one is unchanged. :func:`settle` recovers from a process
    that was killed; it is called here, before and after. One process at a time writes to a target.

    Args:
        target: A folder, which may exist.
        error: Type of the error raised for an `OSError` or a `SafetensorError`, such as on a full disk; its message has
            the target's name and the free space.
        needed: Bytes that must be free before anything is written.
    """
    target = target.expanduser().absolute()
    staging, old, _ = _staging_paths(target)
    lock: int | None = None
    try:
        make_folder(target.parent)
        settle(target)
        if _is_locked(staging):
            raise error(f"{target} is being written by another process; wait for it, or choose another folder.")
        if needed > free_bytes(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
        _lock(lock)
        yield staging
        share_files(staging)
        sync_folder(staging)
        if target.exists():
            target.rename(old)
        staging.rename(target)
        sync(target.parent)
    except (OSError, SafetensorError) as problem:
        raise error(f"{target} can't be written: {problem}.{space_left(target, needed)}") from problem
    finally:
        if lock is not None:
            os.close(lock)
        with suppress(OSError):
            settle(target)


def write_text(target: Path, text: str) -> None:
    """Write a text file as :func:`write_bytes` does."""
    write_bytes(target, text.encode())


def write_bytes(target: Path, content: bytes) -> None:
    """Write a file under another name, sync it, and move it into place.

    Raises:
        CheckpointError: The disk is full, or the folder can't be written.
    """
    staging, *_ = _staging_paths(target)
    try:
        make_folder(target.parent)
        staging.unlink(missing_ok=True)
        with staging.open("xb") as file:  # never through a link of this name
            file.write(content)
        sync(staging)
        staging.replace(target)
        sync(target.parent)
    except OSError as problem:
        raise CheckpointError(f"{target} can't be written: {problem}.{space_left(target)}") from problem
    finally:
        with suppress(OSError):
            staging.unlink()


def settle(target: Path) -> None:
    """Recover from an interrupted write of a file or folder.

    The old version is restored unless the new one is in place, and leftovers are removed. A new version in place is
    complete, since it was synced before. What another process is writing stays.
    """
    staging, old, gone = _staging_paths(target)
    if _is_locked(staging):
        return
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (staging, old, gone):
        _remove(leftover)


def discard(folder: Path) -> None:
    """Remove a folder, renaming it first so that no part of it is ever found under its name.

    Raises:
        CheckpointError: It can't be removed.
    """
    *_, gone = _staging_paths(folder)
    try:
        _remove(gone)
        folder.rename(gone)
    except OSError as problem:
        raise CheckpointError(f"{folder} can't be removed: {problem}.") from problem
    _remove(gone)


def old_name(path: Path) -> Path:
    """Return the first free one of `NAME.old-1`, `NAME.old-2`, … next to a path."""
    names = (path.with_name(f"{path.name}.old-{number}") for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


def make_folder(folder: Path) -> list[Path]:
    """Create a folder and its parents, each synced before the next; return those that did not exist."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync(each.parent)
    folder.mkdir(exist_ok=True)  # raises if it is a file
    return missing


def share_files(folder: Path) -> None:
    """Give the files of a new folder the permissions that the umask gave the folder; safetensors writes them 0600."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        # Some network and FUSE file systems can't sync a folder, and offer no other way.
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def free_bytes(target: Path) -> int:
    """Return the free bytes on the disk of a target, which may not exist yet."""
    folder = next(each for each in (target, *target.absolute().parents) if each.is_dir())
    return shutil.disk_usage(folder).free


def space_left(target: Path, needed: int = 0) -> str:
    """Return the end of an error message: the space that a target takes, if it is known, and the free space."""
    wanted = f" It takes {needed / 1e6:.1f} MB." if needed else ""
    return f"{wanted} {free_bytes(target) / 1e6:.1f} MB are free there."


def _staging_paths(target: Path) -> tuple[Path, Path, Path]:
    """Return the paths next to a target for the new version, the old one, and one that is being removed."""
    staging, old, gone = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old", "gone"))
    return staging, old, gone


def _lock(descriptor: int) -> bool:
    """Lock an open folder until it is closed; returns False if another process has locked it."""
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:  # some network file systems have no locks, and offer no other way
        return True


def _is_locked(folder: Path) -> bool:
    """Check whether a process is writing into a staging folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # absent, or not one of ours
        return False
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
