"""The cache of tokenized data: one folder per key, complete or absent."""

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from qlora.data.store import read_header
from qlora.errors import DataError

# Entries that no run has used for this long are removed when a new one is written.
UNUSED_SECONDS = 30 * 24 * 3600
# Staging folders of killed processes are removed once nothing has been written to them for this long.
ABANDONED_SECONDS = 24 * 3600
# Names of staging folders and of entries; a cache may share its folder with other files.
STAGING = ".qlora-new-"
OUR_NAMES = re.compile(rf"[0-9a-f]{{32}}|{re.escape(STAGING)}\w+")
REPORT = "report.json"


def cache_folder(cache_dir: str | None) -> Path:
    """Return the folder for tokenized data: the given one, or one in the user's cache."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora" / "data"


def find_entry(cache: Path, key: str) -> dict[str, Any] | None:
    """Return the report of a key's entry, or None if there is no complete entry."""
    entry = cache / key
    try:
        read_header(entry)
        report = json.loads((entry / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict):
        return None
    with suppress(OSError):  # a read-only cache is usable too
        os.utime(entry)
    return report


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report of an entry."""
    (folder / REPORT).write_text(json.dumps(report), encoding="utf-8")


@contextmanager
def new_entry(cache: Path, key: str) -> Iterator[Path]:
    """Provide a staging folder that becomes the key's entry when the block ends, or is removed if it raises.

    Raises:
        DataError: The cache can't be written, or the disk is full.
    """
    staging: Path | None = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_unused(cache)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=cache))
        yield staging
        _put_in_place(staging, cache, key)
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else cache
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and not place.is_relative_to(cache):
            raise DataError(f"{place} can't be read: {error.strerror or error}.") from error
        raise DataError(
            f"Tokenized data can't be written to {cache}: {error.strerror or error}; set data.cache_dir to another "
            "folder."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _remove_unused(cache: Path) -> None:
    for other in cache.iterdir():
        with suppress(FileNotFoundError):  # another run may have removed it meanwhile
            if not OUR_NAMES.fullmatch(other.name):
                continue
            if other.name.startswith(STAGING):
                touched, limit = max(path.stat().st_mtime for path in (other, *other.iterdir())), ABANDONED_SECONDS
            else:
                touched, limit = other.stat().st_mtime, UNUSED_SECONDS
            if time.time() - touched > limit:
                shutil.rmtree(other, ignore_errors=True)


def _put_in_place(staging: Path, cache: Path, key: str) -> None:
    """Make a folder the key's entry, unless another run has made one meanwhile; replace a damaged entry."""
    with _lock(cache):
        if find_entry(cache, key) is None:
            shutil.rmtree(cache / key, ignore_errors=True)
            staging.rename(cache / key)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Exclude other processes that lock the same folder, if its file system supports locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            lock_descriptor(descriptor)
        yield
    finally:
        os.close(descriptor)
