"""Files and folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from qlora.errors import CheckpointError


@contextmanager
def write_aside(target: Path, error: type[Exception] = CheckpointError) -> Iterator[Path]:
    """Gives a folder beside `target` to write into; at the end it is synced and takes the target's place.

    If anything fails, the new folder is removed and the old one is untouched.

    Args:
        target: A folder, there or not.
        error: Raised in place of an `OSError`, or safetensors' own error on a full disk, naming the target and
            the space left.
    """
    target = target.expanduser().absolute()
    aside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        sync_folder(aside)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as problem:
        raise error(f"{target} can't be written: {problem}.{space_left(target)}") from problem
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not target.exists():  # the new folder could not take the place
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Writes a text file aside, synced, and moves it into place.

    Raises:
        CheckpointError: The disk is full or the folder can't be written.
    """
    aside = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        aside.replace(target)
    except OSError as problem:
        raise CheckpointError(f"{target} can't be written: {problem}.{space_left(target)}") from problem
    finally:
        with suppress(OSError):
            aside.unlink()


def sync_folder(folder: Path) -> None:
    """Has the disk hold all that is in a folder before anything else happens."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def space_left(target: Path) -> str:
    """A sentence for an error's end: what is free where a target was to be written."""
    folder = next((parent for parent in target.parents if parent.exists()), None)
    return "" if folder is None else f" {shutil.disk_usage(folder).free / 1e6:.0f} MB are free there."
