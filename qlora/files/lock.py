"""One run at a time in a directory: a lock that tells who holds it."""

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
    """Holds a lock file, and removes it at the end, with the folders that were made for it and are empty.

    The system itself lets go of the lock when the process ends, however it ends: a killed process or a reboot leaves a
    file that no one holds, which the next one takes over.

    Args:
        path: Of the file, in the folder that is to have one writer.

    Yields:
        None, or what to tell the user where the file system has no locks.

    Raises:
        CheckpointError: Another process holds it, or the folder can't be written.
    """
    try:
        made = make_folder(path.parent)
        file, warning = _claim(path)
    except OSError as error:
        raise CheckpointError(f"{path.parent} can't be written: {error}.{space_left(path)}") from error
    try:
        yield warning
    finally:
        if _is_at(file, path):  # and not another one's, where the folder was removed and made anew
            path.unlink()
        file.close()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _claim(path: Path) -> tuple[TextIO, str | None]:
    while True:
        file, warning = path.open("a+", encoding="utf-8"), None
        try:
            if not lock_descriptor(file.fileno(), blocking=False):
                with file:
                    raise CheckpointError(_describe_holder(file, path))
        except OSError as error:
            warning = (
                f"{path.parent}: its file system has no locks ({error.strerror}), so see to it yourself that no other "
                "run writes there."
            )
        if _is_at(file, path):
            file.truncate(0)
            file.write(json.dumps(_describe_self()))
            file.flush()
            return file, warning
        file.close()  # whoever held it has removed it meanwhile


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
    except (ValueError, KeyError, TypeError):  # it has the lock, and has not written who it is yet
        holder = "another process"
    return (
        f"{path.parent} is in use by {holder}. Wait for it, stop it (kill -TERM saves its state), or choose another "
        "train.output_dir."
    )
