"""Cache keys: hashes of everything that a source's examples depend on."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from os import stat_result
from pathlib import Path
from typing import Any

from qlora.data.examples import LabelledImage
from qlora.data.formats import COLUMNS, RowReader
from qlora.data.options import EncodeOptions
from qlora.data.rows import Row, load_hub, read_rows
from qlora.data.sources import FoundFiles, Source
from qlora.data.tables import HeaderRule
from qlora.errors import DataError


def key_of(source: Source, found: FoundFiles, identity: list[Any], options: EncodeOptions) -> str:
    """Return the cache key of a source's examples.

    Args:
        source: The source.
        found: Its files.
        identity: What the encoder that makes the examples depends on, as JSON values.
        options: Options of tokenizing.

    Raises:
        DataError: A file can't be read.
    """
    paths = found.paths
    content: Any
    if source.format == "images" and paths:
        # Images are many and large, so they count by size and time.
        content = [*_image_stamps(source, found)]
        content += [] if found.labels else [(str(path.absolute()), _hash_file(path)) for path in paths]
    elif paths and source.max_rows is None:
        content = [(str(path.absolute()), _hash_file(path)) for path in paths]
    elif paths:  # hashing a large file may take much longer than reading its first rows
        stats = [(path.absolute(), path.stat()) for path in paths]
        content = [_stamp(path, stat) for path, stat in stats]
    else:
        content = [(file["filename"], Path(file["filename"]).stat().st_size) for file in load_hub(source).cache_files]
    parts = [
        _hash_of_code(),
        *identity,
        asdict(replace(options, on_bad_row="drop")),
        asdict(replace(source, weight=1.0)),
        content,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def stamps_of(found: FoundFiles) -> list[tuple[int, int]]:
    """Return size and modification time of each file of a source; (-1, 0) for one that was removed."""
    return [_size_and_time(path) for path in found.paths]


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def _stamp(path: Path, stat: stat_result) -> tuple[str, int, int, int]:
    # A copy may keep the time of modification, but not that of the change.
    return str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _image_stamps(source: Source, found: FoundFiles) -> Iterator[tuple[str, int, int, int]]:
    """Yield path, size and times of each image that a source's rows name, as far as there is one."""
    reader = RowReader(source.format, source.columns, source.roles)
    rule = HeaderRule(source.header, source.columns.values(), COLUMNS)
    for row in islice(read_rows(source, rule, found), source.max_rows):
        try:
            example = reader.read(row) if isinstance(row, Row) else None
            if isinstance(example, LabelledImage) and isinstance(example.image, Path):
                yield _stamp(example.image, example.image.stat())
        except (DataError, OSError, ValueError):  # reported with the rows that are read
            continue


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from None


@cache
def _hash_of_code() -> str:
    """Hash the code that reads, renders and tokenizes, as a change to it may change the result."""
    digest = hashlib.sha256()
    readers = [files("qlora.files") / "json_values.py", *files("qlora.data").iterdir()]
    for file in sorted(readers, key=lambda entry: entry.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    for package in ("transformers", "tokenizers", "datasets"):
        digest.update(version(package).encode())
    return digest.hexdigest()
