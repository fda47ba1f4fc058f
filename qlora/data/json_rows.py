"""JSON files to values one at a time, however they are laid out."""

import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from qlora.errors import DataError
from qlora.files.json_values import WHITESPACE, decode_value, parse_value

# Characters read at a time; doubled while a single value does not fit.
BLOCK = 1 << 20
# Of the longest row: a tokenizer needs about a hundred bytes for each of them, and a few KB of gzip may be any number.
MAX_CHARACTERS = 1 << 26
NO_SEPARATOR = re.compile(rf"[^{WHITESPACE},]")
# A value that a block cuts off breaks no further from its end than this: "-Infinity" and "\ud83d" are shorter.
LONGEST_ATOM = 12


def starts_lines(stream: TextIO) -> bool:
    """Whether a JSON file has a value on each line: no array, and the first line is whole."""
    parts = iter(lambda: stream.readline(BLOCK), "")  # the one line of an array may be the whole file
    line = next((part for part in parts if part.strip()), "")
    if line.lstrip().startswith("["):
        return False
    if not line.endswith(("\r", "\n")):
        line += stream.readline(MAX_CHARACTERS)
    try:
        parse_value(line)
    except JSONDecodeError:
        # A broken first line among others is told as such; an object laid out over lines breaks off at the line's end.
        return line.strip() not in ("{", "") and line.rstrip().endswith("}")
    return True


def lines_of(stream: Any, path: Path) -> Iterator[Any]:
    """The lines of a textual or binary stream.

    Raises:
        DataError: One is too long to be a row.
    """
    number = 0
    # Only \n and \r end a line: JSON strings may hold the other separators that str.splitlines() cuts at.
    while line := stream.readline(MAX_CHARACTERS):
        number += 1
        if len(line) >= MAX_CHARACTERS:
            raise _too_long(path, number)
        yield line


def json_lines(stream: TextIO, path: Path) -> Iterator[tuple[int, Any, str]]:
    """Line number, value and problem of every line that is not blank.

    Raises:
        DataError: A line is too long to be a row.
    """
    for number, line in enumerate(lines_of(stream, path), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_value(line), ""
        except JSONDecodeError as error:
            yield number, None, f"broken JSON: {error.msg} (column {error.colno})."


def json_values(stream: TextIO, path: Path) -> Iterator[Any]:
    """The items of an array, or the values that follow one another, without ever holding the whole file.

    Raises:
        DataError: The JSON is broken, or a value too long to be a row; the line is told.
    """
    block, text, position, lines_before = BLOCK, "", 0, 0
    started = in_array = closed = at_end = False
    while True:
        begin = NO_SEPARATOR.search(text, position)
        position = begin.start() if begin else len(text)
        mark = text[position : position + 1]
        if mark == "[" and not started:
            started = in_array = True
            position += 1
            continue
        if mark == "]" and in_array and not closed:
            closed = True
            position += 1
            continue
        if mark and closed:
            raise _broken(path, text, position, lines_before, "something follows the end of the array")
        if mark:
            started = True
            try:
                value, end = decode_value(text, position)
            except JSONDecodeError as error:
                if at_end or not _is_cut_off(error):
                    raise _broken(path, text, error.pos, lines_before, error.msg) from None
            else:
                if at_end or len(text) - end > 2:  # "1." and "1e+" are numbers that go on in the next block
                    yield value
                    position = end
                    continue
        elif at_end:
            if in_array and not closed:
                raise _broken(path, text, position, lines_before, "the array does not end")
            return
        lines_before += text.count("\n", 0, position)
        if len(text) - position > MAX_CHARACTERS:
            raise _too_long(path, lines_before + 1)
        more = stream.read(block)
        at_end = not more
        text, position = text[position:] + more, 0
        block = max(BLOCK, len(text))


def _is_cut_off(error: JSONDecodeError) -> bool:
    """Whether the rest of the file may mend it: without this, a mistake early on would have all of it read."""
    return error.msg.startswith("Unterminated string") or len(error.doc) - error.pos < LONGEST_ATOM


def _too_long(path: Path, number: int) -> DataError:
    return DataError(f"{path}:{number}: a row of more than {MAX_CHARACTERS >> 20} Mi characters; cut it into several.")


def _broken(path: Path, text: str, position: int, lines_before: int, message: str) -> DataError:
    return DataError(f"{path}:{lines_before + text.count(chr(10), 0, position) + 1}: broken JSON: {message}.")
