"""JSON files to values one at a time, however they are laid out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qlora.errors import DataError

# Characters read at a time; doubled while a single value does not fit.
BLOCK = 1 << 20
SEPARATORS = " \t\r\n,"


def starts_lines(stream: TextIO) -> bool:
    """Whether a JSON file has a value on each line: no array, and the first line is whole."""
    line = next((line for line in stream if line.strip()), "")
    if line.lstrip().startswith("["):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError:
        # A broken first line among others is told as such; an object laid out over lines breaks off at the line's end.
        return line.strip() not in ("{", "") and line.rstrip().endswith("}")
    return True


def json_lines(stream: TextIO) -> Iterator[tuple[int, Any, str]]:
    """Line number, value and problem of every line that is not blank."""
    # Only \n ends a line: JSON strings may hold the other separators that str.splitlines() cuts at.
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line), ""
        except json.JSONDecodeError as error:
            yield number, None, f"broken JSON: {error.msg} (column {error.colno})."
        except RecursionError:
            yield number, None, "broken JSON: it is nested too deeply."


def json_values(stream: TextIO, path: Path) -> Iterator[Any]:
    """The items of an array, or the values that follow one another, without ever holding the whole file.

    Raises:
        DataError: The JSON is broken; the line is told.
    """
    decoder, block = json.JSONDecoder(), BLOCK
    text, lines_before, closed = stream.read(block), 0, False
    position = len(text) - len(text.lstrip())
    in_array = text.startswith("[", position)
    position += in_array
    while True:
        while position < len(text) and text[position] in SEPARATORS:
            position += 1
        if in_array and text[position : position + 1] == "]":
            closed = True
            position += 1
            continue
        problem = None
        if position < len(text):
            if closed:
                raise _broken(path, text, position, lines_before, "something follows the end of the array")
            try:
                value, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                problem = error
            except RecursionError:
                raise DataError(f"{path}: broken JSON: it is nested too deeply.") from None
            else:
                yield value
                position = end
                continue
        more = stream.read(block)
        if not more:
            if problem is not None:
                raise _broken(path, text, problem.pos, lines_before, problem.msg) from None
            if in_array and not closed:
                raise _broken(path, text, position, lines_before, "the array does not end")
            return
        lines_before += text.count("\n", 0, position)
        text, position = text[position:] + more, 0
        block = max(BLOCK, len(text))


def _broken(path: Path, text: str, position: int, lines_before: int, message: str) -> DataError:
    return DataError(f"{path}:{lines_before + text.count(chr(10), 0, position) + 1}: broken JSON: {message}.")
