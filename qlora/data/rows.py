"""Sources to rows, each of which knows where it came from. Nothing is held but the row at hand."""

import codecs
import csv
import gzip
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qlora.data.json_rows import MAX_CHARACTERS, json_lines, json_values, lines_of, starts_lines
from qlora.data.sources import TYPES, Source, find_files, type_of
from qlora.data.tables import HeaderRule, table_rows
from qlora.errors import DataError

# Kinds of table, and what is between their fields.
TABLES = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        values: By column.
        origin: File and line or row number, for messages.
    """

    values: dict[str, Any]
    origin: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be read, and why."""

    origin: str
    problem: str


def read_rows(source: Source, rule: HeaderRule) -> Iterator[Row | BadRow]:
    """Read a source row by row.

    Args:
        source: Where the rows are.
        rule: Decides whether tables begin with a header.

    Raises:
        DataError: The source is absent, empty, of a kind that can't be read, or broken beyond a row.
    """
    files = [(file, _kind_of(file, source)) for file in find_files(source)]
    if source.header != "auto" and not any(kind in TABLES for _, kind in files):
        raise DataError(f"{source.path}: header is for CSV and TSV files, and it has none; leave header out.")
    of_files = (row for file, kind in files for row in _read_file(file, kind, source.encoding, rule))
    num_rows = 0
    for row in of_files if files else _read_hub(source):
        num_rows += 1
        yield row
    if not num_rows:
        raise DataError(f"{source.path} holds no rows.")


def _kind_of(path: Path, source: Source) -> str:
    kind = type_of(path) if source.type == "auto" else source.type
    kinds = sorted({*TYPES.values(), "lines"})
    if kind is None:
        raise DataError(
            f"{path}: '{path.suffix}' files can't be read; use one of {', '.join(TYPES)} (textual ones also with .gz), "
            f"or tell what it holds with type: {', '.join(kinds)}."
        )
    if kind not in kinds:
        raise DataError(f"{path}: type '{kind}' is unknown; there are auto, {', '.join(kinds)}.")
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
    """Opens a textual file, with line ends as they are and without its byte-order mark."""
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise DataError(f"encoding: '{encoding}' is unknown; utf-8, latin-1 and utf-16 are usual.") from None
    name = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    return _open(path, "rt", encoding=name, newline="")


@contextmanager
def _open(path: Path, mode: str, **how: str) -> Iterator[Any]:
    """Opens a file, unpacking it by its name, and tells what is wrong with it."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, mode, **how) as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file: {error}.") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from None


def _undecodable(path: Path, encoding: str) -> str:
    """Where the first character is that has no meaning in an encoding."""
    wholly = f" is not {encoding}; convert it, or set encoding for this source."
    if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):
        return wholly  # its lines can't be told apart by their bytes
    with _open(path, "rb") as stream:
        head = stream.read(2)
        if head in (b"\xff\xfe", b"\xfe\xff"):
            return " is UTF-16; set encoding: utf-16 for this source."
        if head == b"\x1f\x8b":
            return " is compressed by gzip; its name should end in .gz."
        stream.seek(0)
        for number, line in enumerate(lines_of(stream, path), start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                where = f"byte 0x{line[error.start]:02x}, byte {error.start + 1} of the line"
                return f":{number}: this is not {encoding} ({where}); convert it, or set encoding for this source."
            except UnicodeError:  # of encodings that tell no place
                break
    return wholly


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
        return BadRow(origin, f"a row should be an object with named columns, not {value!r:.80}.")
    return Row(value, origin)


def _read_table(stream: TextIO, path: Path, kind: str, rule: HeaderRule) -> Iterator[Row | BadRow]:
    csv.field_size_limit(MAX_CHARACTERS)  # documents are longer than its 128 KB
    for number, values, problem in table_rows(lines_of(stream, path), path, TABLES[kind], rule):
        yield BadRow(f"{path}:{number}", problem) if problem else Row(values, f"{path}:{number}")


def _read_text(stream: TextIO, path: Path) -> Iterator[Row]:
    text = stream.read(MAX_CHARACTERS + 1)
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"{path} is one document of more than {MAX_CHARACTERS >> 20} Mi characters; set type: lines to make each "
            "line a row, or make it a .jsonl of documents."
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
    """Rows of a parquet or arrow file, in whose nested columns an absent key is a None."""
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
    """A data set on the hub, downloaded once by datasets.

    Raises:
        DataError: It can't be had.
    """
    from datasets import load_dataset

    name, _, split = source.path.partition(":")
    subset = {"name": source.subset} if source.subset else {}
    try:
        return load_dataset(name, **subset, split=source.split or split or "train", revision=source.revision)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise DataError(f"{source.path} is no file here, and can't be read from the hub: {error}") from error


def _undecoded(rows: Any) -> Any:
    """Rows as they are stored: decoding would open whatever file or address they say that an image or sound is at."""
    return rows.decode(False)


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nones(item) for key, item in value.items() if item is not None}
    return [_without_nones(item) for item in value] if isinstance(value, list) else value
