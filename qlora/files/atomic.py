"""Files and folders that are there whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from qlora.errors import CheckpointError


@contextmanager
def write_aside(target: Path, error: type[Exception] = CheckpointError, needed: int = 0) -> Iterator[Path]:
    """Gives a folder beside `target` to write into; at the end it is synced and takes the target's place.

    If anything fails, the new folder is removed and the old one is untouched. What a killed process leaves,
    :func:`settle` puts right; it is called here, before and after.

    Args:
        target: A folder, there or not.
        error: Raised in place of an `OSError`, or safetensors' own error on a full disk, naming the target and
            the space left.
        needed: Bytes that have to be free before anything is written.
    """
    target = target.expanduser().absolute()
    aside, old, _ = _beside(target)
    try:
        make_folder(target.parent)
        settle(target)
        if needed > free_bytes(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        aside.mkdir()
        yield aside
        share_files(aside)
        sync_folder(aside)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        sync(target.parent)
    except (OSError, SafetensorError) as problem:
        raise error(f"{target} can't be written: {problem}.{space_left(target, needed)}") from problem
    finally:
        with suppress(OSError):
            settle(target)


def write_text(target: Path, text: str) -> None:
    """Writes a text file as :func:`write_bytes` does."""
    write_bytes(target, text.encode())


def write_bytes(target: Path, content: bytes) -> None:
    """Writes a file aside, synced, and moves it into place.

    Raises:
        CheckpointError: The disk is full or the folder can't be written.
    """
    aside, *_ = _beside(target)
    try:
        make_folder(target.parent)
        aside.unlink(missing_ok=True)
        with aside.open("xb") as file:  # through no link that lies there
            file.write(content)
        sync(aside)
        aside.replace(target)
        sync(target.parent)
    except OSError as problem:
        raise CheckpointError(f"{target} can't be written: {problem}.{space_left(target)}") from problem
    finally:
        with suppress(OSError):
            aside.unlink()


def settle(target: Path) -> None:
    """Puts right what a killed writer left beside a file or folder.

    The old one comes back if the new one was not in its place yet, and the rest is removed: what has its place was
    synced before it got there.
    """
    aside, old, gone = _beside(target)
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (aside, old, gone):
        _remove(leftover)


def discard(folder: Path) -> None:
    """Removes a folder so that no half of it is ever found by its name.

    Raises:
        CheckpointError: The disk refuses.
    """
    *_, gone = _beside(folder)
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
    """Makes a folder and its parents, each on the disk before the next; returns those that were not there."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync(each.parent)
    folder.mkdir(exist_ok=True)  # a file in its place is told
    return missing


def share_files(folder: Path) -> None:
    """Give the files of a new folder the rights that the umask gave the folder; safetensors writes them 0600."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Has the disk hold all that is in a folder before anything else happens."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Has the disk hold a file, or a folder's names, before anything else happens."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        # Some network and FUSE file systems can't sync a folder, and then have no other way to be asked.
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def free_bytes(target: Path) -> int:
    """What is free where a target is, or is to be."""
    folder = next(each for each in (target, *target.absolute().parents) if each.is_dir())
    return shutil.disk_usage(folder).free


def space_left(target: Path, needed: int = 0) -> str:
    """Sentences for an error's end: what a target takes, if that is known, and what is free there."""
    wanted = f" It takes {needed / 1e6:.1f} MB." if needed else ""
    return f"{wanted} {free_bytes(target) / 1e6:.1f} MB are free there."


def _beside(target: Path) -> tuple[Path, Path, Path]:
    """Names beside a target for the new one, the old one, and one that is being removed."""
    aside, old, gone = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old", "gone"))
    return aside, old, gone


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
