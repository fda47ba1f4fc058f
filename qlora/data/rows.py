"""Files and data sets to rows, each of which knows where it came from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import DataError

SUFFIXES = (".json", ".jsonl", ".txt")
# A name that ends so is meant as a file, even where there is none.
OTHER_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".yaml", ".md")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        values: By column.
        origin: File and line or row number, for messages.
    """

    values: dict[str, Any]
    origin: str


def read_rows(source: str) -> list[Row]:
    """Reads all rows of a source.

    Args:
        source: A `.json` (array or JSON lines), `.jsonl` or `.txt` file (one row of text), or a data set on
            the hub as `owner/name` or `owner/name:split`; the split is `train` unless given.

    Raises:
        DataError: The source is absent, empty, of another kind, or broken; the line is named.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = list(_read_file(path))
    elif path.suffix in SUFFIXES + OTHER_SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(f"Data file not found: {source}; data.train and data.eval name files here or on the hub.")
    else:
        rows = _read_hub(source)
    if not rows:
        raise DataError(f"{source} holds no rows.")
    return rows


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: can't read '{path.suffix}' files; use one of {', '.join(SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it first.") from None
    if path.suffix == ".txt":
        if text.strip():
            yield Row({"text": text}, str(path))
    elif path.suffix == ".json" and text.lstrip().startswith("["):
        yield from _parse_array(text, path)
    else:
        yield from _parse_lines(text, path)


def _parse_array(text: str, path: Path) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON: {error.msg}.") from None
    for number, value in enumerate(values, start=1):
        yield _row(value, f"{path} row {number}")


def _parse_lines(text: str, path: Path) -> Iterator[Row]:
    # Only \n ends a line: JSON strings may hold the other separators that str.splitlines() cuts at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: broken JSON: {error.msg} (column {error.colno}).") from None
        yield _row(value, f"{path}:{number}")


def _row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row should be an object with named columns, not {value!r:.80}.")
    return Row(value, origin)


def _read_hub(source: str) -> list[Row]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:  # the hub's client raises errors of many libraries
        raise DataError(f"{source} is no file here, and can't be read from the hub: {error}") from error
    return [Row(values, f"{source} row {number}") for number, values in enumerate(dataset, start=1)]
