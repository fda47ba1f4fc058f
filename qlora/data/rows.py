"""Rows of sources, read one at a time, each with its origin."""

import codecs
import csv
import gzip
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from qlora.data.json_rows import MAX_CHARACTERS, json_lines, json_values, lines_of, starts_lines
from qlora.data.sources import TYPES, FoundFiles, Source, find_files, type_of
from qlora.data.tables import HeaderRule, table_rows
from qlora.errors import DataError

# Delimiters by type of table.
TABLES = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        values: Values by column.
        origin: File and line or row number, for messages.
        folder: Folder that relative paths of images count from, that of the file; None for other rows.
    """

    values: dict[str, Any]
    origin: str
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be read.

    Attributes:
        origin: File and line or row number, for messages.
        problem: Why it can't be read.
    """

    origin: str
    problem: str


def read_rows(source: Source, rule: HeaderRule, found: FoundFiles | None = None) -> Iterator[Row | BadRow]:
    """Read a source row by row.

    Args:
        source: The source.
        rule: Decides whether tables begin with a header.
        found: The source's files; None finds them.

    Raises:
        DataError: The source is absent, empty, of an unknown type, or broken as a whole.
    """
    found = find_files(source) if found is None else found
    if found.labels:
        for image, label in zip(found.paths, found.labels, strict=True):
            yield Row({"image": str(image.absolute()), "label": label}, str(image))
        return
    files = [(file, _kind_of(file, source)) for file in found.paths]
    if source.header != "auto" and not any(kind in TABLES for _, kind in files):
        raise DataError(f"{source.path}: header applies to CSV and TSV files, and it has none; remove header.")
    of_files = (
        replace(row, folder=file.parent) if source.format == "images" and isinstance(row, Row) else row
        for file, kind in files
        for row in _read_file(file, kind, source.encoding, rule)
    )
    num_rows = 0
    for row in of_files if files else _read_hub(source):
        num_rows += 1
        yield row
    if not num_rows:
        raise DataError(f"{source.path} has no rows.")


def _kind_of(path: Path, source: Source) -> str:
    kind = type_of(path) if source.type == "auto" else source.type
    kinds = sorted({*TYPES.values(), "lines"})
    if kind is None:
        raise DataError(
            f"{path}: '{path.suffix}' files can't be read; use one of {', '.join(TYPES)} (text files also as .gz), "
            f"or set type to one of {', '.join(kinds)}."
        )
    if kind not in kinds:
        raise DataError(f"{path}: type '{kind}' is unknown; use one of auto, {', '.join(kinds)}.")
    return kind


def _read_file(path: Path, kind: str, encoding: str, rule: HeaderRule) -> Iterator[Row | BadRow]:
    if kind in ("parquet", "arrow"):
        yield from _read_columns(path, kind)
        return
    try:
        if kind == "json":
            with _open_text(path, encoding) as stream:
                kind = "jsonl" if starts_lines(stream) else "json"
        with _open_text(path, encoding) as stream:
            yield from _read_table(stream, path, kind, rule) if kind in TABLES else _READERS[kind](stream, path)
    except UnicodeError:
        raise DataError(f"{path}{_undecodable(path, encoding)}") from None


def _open_text(path: Path, encoding: str) -> AbstractContextManager[TextIO]:
    """Open a text file, keeping line ends and skipping a byte-order mark."""
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise DataError(f"encoding: '{encoding}' is unknown; common ones are utf-8, latin-1 and utf-16.") from None
    name = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    return _open(path, "rt", encoding=name, newline="")


@contextmanager
def _open(path: Path, mode: str, **how: str) -> Iterator[Any]:
    """Open a file, decompress it if its suffix is .gz, and raise DataError if it can't be read."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, mode, **how) as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file: {error}.") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from None


def _undecodable(path: Path, encoding: str) -> str:
    """Describe the first place in a file that can't be decoded."""
    anywhere = f" is not {encoding}; convert it, or set encoding for this source."
    if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):
        return anywhere  # its line ends can't be found in the bytes
    with _open(path, "rb") as stream:
        head = stream.read(2)
        if head in (b"\xff\xfe", b"\xfe\xff"):
            return " is UTF-16; set encoding: utf-16 for this source."
        if head == b"\x1f\x8b":
            return " is compressed with gzip; rename it to end in .gz."
        stream.seek(0)
        for number, line in enumerate(lines_of(stream, path), start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                where = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line"
                return f":{number}: invalid {encoding} ({where}); convert it, or set encoding for this source."
            except UnicodeError:  # some encodings give no position
                break
    return anywhere


def _read_json(stream: TextIO, path: Path) -> Iterator[Row | BadRow]:
    for number, value in enumerate(json_values(stream, path), start=1):
        yield _row(value, f"{path} row {number}")


def _read_json_lines(stream: TextIO, path: Path) -> Iterator[Row | BadRow]:
    for number, value, problem in json_lines(stream, path):
        yield BadRow(f"{path}:{number}", problem) if problem else _row(value, f"{path}:{number}")


def _row(value: Any, origin: str) -> Row | BadRow:
    if isinstance(value, str):
        return Row({"text": value}, origin)
    if not isinstance(value, dict):
        return BadRow(origin, f"a row should be a JSON object, not {value!r:.80}.")
    return Row(value, origin)


def _read_table(stream: TextIO, path: Path, kind: str, rule: HeaderRule) -> Iterator[Row | BadRow]:
    csv.field_size_limit(MAX_CHARACTERS)  # its default of 128 KB is too short for documents
    for number, values, problem in table_rows(lines_of(stream, path), path, TABLES[kind], rule):
        yield BadRow(f"{path}:{number}", problem) if problem else Row(values, f"{path}:{number}")


def _read_text(stream: TextIO, path: Path) -> Iterator[Row]:
    text = stream.read(MAX_CHARACTERS + 1)
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"{path} is one document of more than {MAX_CHARACTERS >> 20} Mi characters; set type: lines to make each "
            "line a row, or convert it to a .jsonl of documents."
        )
    if text.strip():
        yield Row({"text": text.replace("\r\n", "\n")}, str(path))


def _read_lines(stream: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines_of(stream, path), start=1):
        if line.strip():
            yield Row({"text": line.rstrip("\r\n")}, f"{path}:{number}")


_READERS: dict[str, Any] = {
    "json": _read_json,
    "jsonl": _read_json_lines,
    "text": _read_text,
    "lines": _read_lines,
}


def _read_columns(path: Path, kind: str) -> Iterator[Row]:
    """Read the rows of a parquet or arrow file; its nested columns have None for absent keys."""
    from datasets import load_dataset

    try:
        rows = _undecoded(load_dataset(kind, data_files=str(path), split="train", streaming=True))
        for number, values in enumerate(rows, start=1):
            yield Row(_without_nones(values), f"{path} row {number}")
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise errors of many kinds
        raise DataError(f"{path} can't be read as {kind}: {error}") from error


def _read_hub(source: Source) -> Iterator[Row]:
    for number, values in enumerate(_undecoded(load_hub(source).to_iterable_dataset()), start=1):
        yield Row(_without_nones(values), f"{source.path} row {number}")


def load_hub(source: Source) -> Any:
    """Load a dataset from the hub, or from the cache of `datasets`.

    Raises:
        DataError: It is not available.
    """
    from datasets import load_dataset

    name, _, split = source.path.partition(":")
    subset = {"name": source.subset} if source.subset else {}
    try:
        return load_dataset(name, **subset, split=source.split or split or "train", revision=source.revision)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise DataError(f"{source.path} is not a local file, and can't be read from the hub: {error}") from error


def _undecoded(rows: Any) -> Any:
    """Return rows without decoding, which would open any file or address that an image or audio column names."""
    return rows.decode(False)


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nones(item) for key, item in value.items() if item is not None}
    return [_without_nones(item) for item in value] if isinstance(value, list) else value
