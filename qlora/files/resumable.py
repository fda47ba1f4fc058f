"""A folder beside the target that an interrupted merge goes on in, and that one process at a time writes into."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from filelock import lock_descriptor
from safetensors import SafetensorError

from qlora.errors import ExportError
from qlora.files.atomic import free_bytes, space_left, sync, sync_folder

# What is being written, as a key; locked by the process that writes.
STATE_FILE = "merge_state"


def new_folder(path: str | Path) -> Path:
    """Where a folder may be written, as an absolute path: what is beside it, and its name, are told by that alone.

    Raises:
        ExportError: Something is there already, be it a link, which no folder can take the place of.
    """
    folder = Path(os.path.abspath(Path(path).expanduser()))
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        left = _aside(folder)
        also = f" {left} is left of a merge that was stopped as it ended; remove it too." if left.exists() else ""
        raise ExportError(f"{folder} exists already; choose another folder or remove it.{also}")
    return folder


@contextmanager
def continued_aside(target: Path, key: str, needed: int = 0) -> Iterator[Path]:
    """Gives a folder beside `target` to write into: new, or as an interrupted writer of the same key left it.

    It is removed at the end, from which :func:`put_in_place` saves what is to stay, and when writing fails. What a
    killed or interrupted process wrote is kept, and so it is when something else fails.

    Args:
        target: A folder that is not there yet, or empty.
        key: Tells what is written; whoever has the same writes the same bytes.
        needed: Bytes that will have been written at the end.

    Raises:
        ExportError: Something else lies there, another process writes there, or the disk refuses or has too little
            room, which is told before anything is written.
    """
    target = target.expanduser().absolute()
    aside = _aside(target)
    try:
        aside.mkdir(parents=True, exist_ok=True)
        if aside.is_symlink() or aside.stat().st_uid != os.geteuid():  # in a folder that others may write to
            raise ExportError(f"{aside} was put there by someone else; choose another folder.")
        with (aside / STATE_FILE).open("a+", encoding="utf-8") as state:
            _claim(aside, state, key)
            if needed - _size(aside) > free_bytes(target):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                yield aside
            except (OSError, SafetensorError, ExportError):
                shutil.rmtree(aside, ignore_errors=True)
                raise
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as problem:
        raise ExportError(f"{target} can't be written: {problem}.{space_left(target, needed)}") from problem


def put_in_place(folder: Path, target: Path) -> None:
    """Syncs a folder and gives it the target's name, unless something came to be there meanwhile.

    Raises:
        OSError: The target is not empty, or the disk refuses.
    """
    target = target.expanduser().absolute()
    sync_folder(folder)
    with suppress(FileNotFoundError):
        target.rmdir()
    folder.rename(target)
    sync(target.parent)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.merging")


def _size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _claim(aside: Path, state: TextIO, key: str) -> None:
    """Locks the folder for as long as the state file is open, and sees that it is ours to go on in."""
    try:
        is_there = lock_descriptor(state.fileno(), blocking=False) and os.path.samestat(
            os.fstat(state.fileno()), (aside / STATE_FILE).stat()
        )
    except FileNotFoundError:
        is_there = False
    if not is_there:
        raise ExportError(f"{aside} is being written by another qlora merge; wait for it, or choose another folder.")
    state.seek(0)
    found = state.read()
    if found == key:
        return
    if found or any(path.name != STATE_FILE for path in aside.iterdir()):
        raise ExportError(
            f"{aside} holds what a merge with other settings, or of another run, left when it was interrupted; the "
            f"same command as then goes on with it. Remove {aside}, or choose another folder."
        )
    state.write(key)
    state.flush()
