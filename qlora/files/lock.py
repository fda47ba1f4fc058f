"""One run at a time in a directory: a lock that names its holder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from filelock import lock_descriptor

from qlora.errors import CheckpointError
from qlora.files.atomic import make_folder, space_left


@contextmanager
def hold_lock(path: Path) -> Iterator[str | None]:
    """Context that holds a lock file; on exit it removes the file and the empty folders that were created for it.

    The system releases the lock when the process ends for any reason. A killed process or a reboot leaves an unlocked
    file, which the next process takes over.

    Args:
        path: Path of the lock file, in the folder that may have one writer.

    Yields:
        None, or a warning for the user if the file system has no locks.

    Raises:
        CheckpointError: Another process holds the lock, or the folder can't be written.
    """
    try:
        made = make_folder(path.parent)
        file, warning = _claim(path)
    except OSError as error:
        raise CheckpointError(f"{path.parent} can't be written: {error}.{space_left(path)}") from error
    try:
        yield warning
    finally:
        if _is_at(file, path):  # not another process's file in a folder that was removed and created again
            path.unlink()
        file.close()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Context that holds a lock file, after waiting for another process that holds it; the file stays.

    Where the file system has no locks, nothing is held.

    Raises:
        OSError: The file can't be written.
    """
    with path.open("a") as file:
        with suppress(OSError):
            lock_descriptor(file.fileno(), blocking=True)
        yield


def is_held(path: Path) -> bool:
    """Return whether a process holds a lock file; also true if that can't be found out.

    Args:
        path: Path of the lock file, which may not exist.
    """
    try:
        with path.open("r+", encoding="utf-8") as file:
            return not lock_descriptor(file.fileno(), blocking=False)
    except FileNotFoundError:
        return False
    except OSError:  # another user's file, or a file system without locks
        return True


def _claim(path: Path) -> tuple[TextIO, str | None]:
    while True:
        file, warning = path.open("a+", encoding="utf-8"), None
        try:
            if not lock_descriptor(file.fileno(), blocking=False):
                with file:
                    raise CheckpointError(_describe_holder(file, path))
        except OSError as error:
            warning = (
                f"{path.parent}: its file system has no locks ({error.strerror}); make sure that no other run writes "
                "there."
            )
        if _is_at(file, path):
            file.truncate(0)
            file.write(json.dumps(_describe_self()))
            file.flush()
            return file, warning
        file.close()  # its last holder removed it meanwhile


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _describe_self() -> dict[str, str | int]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _describe_holder(file: TextIO, path: Path) -> str:
    file.seek(0)
    try:
        holder = "process {pid} on {host} since {since}".format(**json.load(file))
    except (ValueError, KeyError, TypeError):  # it holds the lock, but has not written its name yet
        holder = "another process"
    return (
        f"{path.parent} is in use by {holder}. Wait for it, stop it (kill -TERM saves its state), or choose another "
        "train.output_dir."
    )
