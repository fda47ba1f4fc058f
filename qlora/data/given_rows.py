"""Rows in memory, as a file that a config can name."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora.data.cache import cache_folder
from qlora.errors import CheckpointError, DataError
from qlora.files import write_bytes


def store_rows(rows: Iterable[Mapping[str, Any]], cache_dir: str | None = None, image: str | None = None) -> Path:
    """Write rows to a file in the cache of tokenized data; equal rows have the same file.

    Args:
        rows: A list of dicts, a `datasets.Dataset`, or anything else that yields dicts.
        cache_dir: Folder of the cache; by default the one in the user's cache.
        image: Column with the path of an image, which is made absolute, as the rows are read in another folder.

    Returns:
        A JSONL file, named by its content.

    Raises:
        DataError: There are no rows, a row is not a dict of JSON values, or the file can't be written.
    """
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"Row {number} is {row!r:.80}; rows should be dicts: a list of them or a datasets.Dataset, not a "
                f"{type(rows).__name__}. Of a pandas DataFrame, give df.to_dict('records')."
            )
        try:
            values = {name: _absolute(value) if name == image else value for name, value in row.items()}
            lines.append(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(f"Row {number} has a value that JSON has not: {error}.") from None
    if not lines:
        raise DataError("There are no rows to train on.")
    content = "".join(lines).encode()
    path = cache_folder(cache_dir) / "rows" / f"{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not (path.is_file() and path.stat().st_size == len(content)):
        try:
            write_bytes(path, content)
        except CheckpointError as error:
            raise DataError(f"{error} Set data.cache_dir to another folder.") from None
    return path


def _absolute(image: Any) -> Any:
    """Return an image with its path made absolute; what is no path is left for the reader to refuse."""
    if isinstance(image, dict):
        return {**image, "path": _absolute(image.get("path"))}
    is_path = isinstance(image, Path) or isinstance(image, str) and image.strip() and not image.startswith("~")
    return os.path.abspath(image) if is_path else image
