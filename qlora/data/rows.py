"""Files, folders and data sets to rows, each of which knows where it came from. Nothing is held but the row at hand."""

import codecs
import csv
import gzip
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from qlora.data.json_rows import json_lines, json_values, starts_lines
from qlora.errors import DataError

# What a file holds, by the end of its name.
TYPES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
# A name that ends so is meant as a file, even where there is none.
OTHER_SUFFIXES = (".gz", ".zip", ".yaml", ".md", ".xlsx", ".zst", ".bz2", ".xz")
# Names of the parts that data sets are usually cut into.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "heldout"),
    "test": ("test", "testing"),
}
# Files that describe others: of data sets saved by datasets, and of folders of LLaMA-Factory.
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")
# A text file is one document; a tokenizer needs about a hundred bytes for each of its bytes.
MAX_TEXT_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Source:
    """Rows somewhere, and how to read them.

    Attributes:
        path: A file, a folder of files, or a data set on the hub as `owner/name` or `owner/name:split`. Files are
            `.json` (an array, objects or lines), `.jsonl`, `.csv`, `.tsv`, `.parquet`, `.arrow` or `.txt` (one
            row of text), the textual ones also with `.gz`.
        weight: How often an epoch sees its examples: 2 is twice, 0.5 every other one.
        split: Of a folder or a data set; `train` where it has parts of such names.
        subset: Of a data set on the hub that has several.
        revision: Of a data set on the hub.
        type: What a file holds if its name does not tell: one of `TYPES`, or `lines`: a row of text each.
        encoding: Of textual files.
        format: How the columns are read: one of :data:`qlora.data.formats.FORMATS`, or `auto`.
        columns: Our name of a column to theirs.
        roles: Their name of a speaker to ours.
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    type: str = "auto"
    encoding: str = "utf-8"
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


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


def find_files(source: Source) -> list[Path]:
    """The files of a source, in order; none if it is a data set on the hub.

    Raises:
        DataError: It names a file or folder that is absent or holds nothing to read.
    """
    try:
        path = Path(source.path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a home that is nobody's
        raise DataError(f"{source.path} can't be read: {error}") from None
    if is_file:
        return [path]
    if is_folder:
        return _files_of_folder(path, source.split)
    if path.suffix.lower() in (*TYPES, *OTHER_SUFFIXES) or source.path.startswith((".", "/", "~")):
        raise DataError(f"Data file not found: {source.path}; data.train and data.eval name files or hub data sets.")
    return []


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """Reads a source row by row.

    Raises:
        DataError: The source is absent, empty, of a kind that can't be read, or broken beyond a row.
    """
    files = find_files(source)
    num_rows = 0
    for row in _read_hub(source) if not files else (row for file in files for row in _read_file(file, source)):
        num_rows += 1
        yield row
    if not num_rows:
        raise DataError(f"{source.path} holds no rows.")


def files_left_out(source: Source) -> list[str]:
    """Names of the files in a source's folder that are not read: of another split, of no known type, beside data."""
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        return []
    read = set(find_files(source))
    others = (path for path in sorted(folder.rglob("*")) if path.is_file() and path not in read)
    return [str(path.relative_to(folder)) for path in others if not _is_hidden(path.relative_to(folder))]


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    """The data files below a folder that belong to a split; without such names, all are taken for training data."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_data(path.relative_to(folder))]
    wanted = next((name for name, words in SPLITS.items() if split in words), split) or "train"
    splits = {path: _split_of(path.relative_to(folder), wanted) for path in files}
    chosen = [path for path in files if splits[path] == wanted]
    if not chosen and wanted == "train":
        chosen = [path for path in files if splits[path] is None]
    if any(_type_of(path) != "text" for path in chosen):
        chosen = [path for path in chosen if _type_of(path) != "text"]  # a licence or a description beside the data
    if not chosen:
        there = ", ".join(path.name for path in files[:4]) or "nothing"
        raise DataError(
            f"{folder} holds no data of the split '{wanted}' (there is {there}); set split, or name a file."
        )
    return chosen


def _is_data(path: Path) -> bool:
    """Whether a file of a folder holds rows: none that is hidden, describes others, or was left behind by datasets."""
    is_left = path.name in DESCRIPTIONS or path.match("cache-*.arrow")
    return not _is_hidden(path) and not is_left and _type_of(path) is not None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_of(path: Path, wanted: str) -> str | None:
    """The split that a file's name tells first, or else the folder nearest to it that tells one."""
    for part in (path.name.lower(), *(part.lower() for part in reversed(path.parts[:-1]))):
        words = re.split(r"[^a-z0-9]+", part)
        if wanted not in SPLITS and (wanted in words or part.startswith(wanted)):
            return wanted
        for word in words:
            named = next((name for name, words in SPLITS.items() if word in words), None)
            if named is not None:
                return named
    return None


def _type_of(path: Path) -> str | None:
    name = Path(path.name.lower())
    return TYPES.get(name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix)


def _read_file(path: Path, source: Source) -> Iterator[Row | BadRow]:
    kind = _type_of(path) if source.type == "auto" else source.type
    kinds = sorted({*TYPES.values(), "lines"})
    if kind is None:
        raise DataError(
            f"{path}: '{path.suffix}' files can't be read; use one of {', '.join(TYPES)} (textual ones also with .gz), "
            f"or tell what it holds with type: {', '.join(kinds)}."
        )
    if kind not in kinds:
        raise DataError(f"{path}: type '{kind}' is unknown; there are auto, {', '.join(kinds)}.")
    if kind in ("parquet", "arrow"):
        yield from _read_columns(path, kind)
        return
    try:
        if kind == "json":
            with _open_text(path, source.encoding) as stream:
                kind = "jsonl" if starts_lines(stream) else "json"
        with _open_text(path, source.encoding) as stream:
            yield from _READERS[kind](stream, path)
    except UnicodeError:
        raise DataError(f"{path}{_undecodable(path, source.encoding)}") from None


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
        for number, line in enumerate(stream, start=1):
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
    for number, value, problem in json_lines(stream):
        yield BadRow(f"{path}:{number}", problem) if problem else _row(value, f"{path}:{number}")


def _row(value: Any, origin: str) -> Row | BadRow:
    if isinstance(value, str):
        return Row({"text": value}, origin)
    if not isinstance(value, dict):
        return BadRow(origin, f"a row should be an object with named columns, not {value!r:.80}.")
    return Row(value, origin)


def _read_table(stream: TextIO, path: Path, delimiter: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(sys.maxsize)  # documents are longer than its 128 KB
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        origin = f"{path}:{reader.line_num + 1}"  # where it begins: a quote that is not closed runs to the file's end
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError(f"{origin}: broken CSV header: {error}.") from None
            yield BadRow(origin, f"broken CSV: {error}.")
            continue
        if not fields:
            continue
        if header is None:
            header = fields
            if len(set(header)) < len(header):
                raise DataError(f"{origin}: the header names a column twice: {', '.join(header)}.")
        elif len(fields) != len(header):
            lines = f" (up to line {reader.line_num})" if "\n" in "".join(fields) else ""
            yield BadRow(origin, f"{len(fields)} fields{lines}, but the header names {len(header)}.")
        else:
            yield Row(dict(zip(header, fields, strict=True)), origin)


def _read_text(stream: TextIO, path: Path) -> Iterator[Row]:
    text = stream.read(MAX_TEXT_BYTES + 1)
    if len(text) > MAX_TEXT_BYTES:
        raise DataError(
            f"{path} is one document of more than {MAX_TEXT_BYTES >> 20} MiB; set type: lines to make each line a row, "
            "or make it a .jsonl of documents."
        )
    if text.strip():
        yield Row({"text": text.replace("\r\n", "\n")}, str(path))


def _read_lines(stream: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield Row({"text": line.rstrip("\r\n")}, f"{path}:{number}")


_READERS: dict[str, Any] = {
    "json": _read_json,
    "jsonl": _read_json_lines,
    "csv": lambda stream, path: _read_table(stream, path, ","),
    "tsv": lambda stream, path: _read_table(stream, path, "\t"),
    "text": _read_text,
    "lines": _read_lines,
}


def _read_columns(path: Path, kind: str) -> Iterator[Row]:
    """Rows of a parquet or arrow file, in whose nested columns an absent key is a None."""
    from datasets import load_dataset

    try:
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=True)
        for number, values in enumerate(rows, start=1):
            yield Row(_without_nones(values), f"{path} row {number}")
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise errors of many kinds
        raise DataError(f"{path} can't be read as {kind}: {error}") from error


def _read_hub(source: Source) -> Iterator[Row]:
    for number, values in enumerate(load_hub(source), start=1):
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


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nones(item) for key, item in value.items() if item is not None}
    return [_without_nones(item) for item in value] if isinstance(value, list) else value
