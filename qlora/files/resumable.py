"""A folder next to the target in which an interrupted merge resumes, written by one process at a time."""

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

# Contains the key of the files being written; locked by the process that writes.
STATE_FILE = "merge_state"


def new_folder(path: str | Path) -> Path:
    """Return the absolute path of a folder that is about to be written.

    Raises:
        ExportError: The path already exists and is not an empty folder; a link counts too.
    """
    folder = Path(os.path.abspath(Path(path).expanduser()))
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        left = _staging(folder)
        also = f" {left} is left from an interrupted merge; remove it too." if left.exists() else ""
        raise ExportError(f"{folder} already exists; choose another folder or remove it.{also}")
    return folder


@contextmanager
def resumable_folder(target: Path, key: str, needed: int = 0) -> Iterator[Path]:
    """Context that yields a folder next to `target` to write into: a new one, or one of an interrupted writer.

    The folder is removed on exit and when writing fails; move the files that should stay out of it with
    :func:`put_in_place`. It is kept if the process is killed or interrupted, or fails for another reason.

    Args:
        target: A folder that does not exist yet, or is empty.
        key: Identifies the files being written: equal keys mean equal bytes. An interrupted writer's folder is used
            only if it has the same key.
        needed: Bytes of all files at the end.

    Raises:
        ExportError: The folder has other files, another process writes into it, the disk fails, or it has too little
            space, which is checked before anything is written.
    """
    target = target.expanduser().absolute()
    staging = _staging(target)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        if staging.is_symlink() or staging.stat().st_uid != os.geteuid():  # others may write to the parent folder
            raise ExportError(f"{staging} was created by another user; choose another folder.")
        with (staging / STATE_FILE).open("a+", encoding="utf-8") as state:
            _claim(staging, state, key)
            try:
                if needed - _size(staging) > free_bytes(target):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                yield staging
            except (OSError, SafetensorError, ExportError):
                shutil.rmtree(staging, ignore_errors=True)
                raise
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as problem:
        raise ExportError(f"{target} can't be written: {problem}.{space_left(target, needed)}") from problem


def put_in_place(folder: Path, target: Path) -> None:
    """Sync a folder and rename it to the target, unless something was created there meanwhile.

    Raises:
        OSError: The target is not empty, or the disk fails.
    """
    target = target.expanduser().absolute()
    sync_folder(folder)
    with suppress(FileNotFoundError):
        target.rmdir()
    folder.rename(target)
    sync(target.parent)


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.merging")


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _claim(staging: Path, state: TextIO, key: str) -> None:
    """Lock the folder for as long as the state file is open, and check that it has the same key or is empty."""
    try:
        is_there = lock_descriptor(state.fileno(), blocking=False) and os.path.samestat(
            os.fstat(state.fileno()), (staging / STATE_FILE).stat()
        )
    except FileNotFoundError:
        is_there = False
    if not is_there:
        raise ExportError(f"{staging} is being written by another qlora merge; wait for it, or choose another folder.")
    state.seek(0)
    found = state.read()
    if found == key:
        return
    if found or any(path.name != STATE_FILE for path in staging.iterdir()):
        raise ExportError(
            f"{staging} has files of an interrupted merge with other settings or of another run. Repeat that command "
            f"to resume it, remove {staging}, or choose another folder."
        )
    state.write(key)
    state.flush()
