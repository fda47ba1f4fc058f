"""Values of JSON files of any layout, read one at a time."""

import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from qlora.errors import DataError
from qlora.files.json_values import WHITESPACE, decode_value, parse_value

# Number of characters read at a time, doubled while a single value does not fit.
BLOCK = 1 << 20
# Length of the longest row: a tokenizer needs about a hundred bytes per character, and a few KB of gzip can expand to
# any number of them.
MAX_CHARACTERS = 1 << 26
NO_SEPARATOR = re.compile(rf"[^{WHITESPACE},]")
# A value that a block cuts off fails within this many characters of the end: "-Infinity" and "\ud83d" are shorter.
LONGEST_ATOM = 12


def starts_lines(stream: TextIO) -> bool:
    """Return whether a JSON file has one value per line: it isn't an array, and its first line is complete."""
    parts = iter(lambda: stream.readline(BLOCK), "")  # an array may be the whole file in one line
    line = next((part for part in parts if part.strip()), "")
    if line.lstrip().startswith("["):
        return False
    if not line.endswith(("\r", "\n")):
        line += stream.readline(MAX_CHARACTERS)
    try:
        parse_value(line)
    except JSONDecodeError:
        # A broken first line is reported as such; the first line of an object over several lines is incomplete.
        return line.strip() not in ("{", "") and line.rstrip().endswith("}")
    return True


def lines_of(stream: Any, path: Path) -> Iterator[Any]:
    """Yield the lines of a text or binary stream.

    Raises:
        DataError: A line is longer than `MAX_CHARACTERS`.
    """
    number = 0
    # Only \n and \r end a line: JSON strings may contain the other separators of str.splitlines().
    while line := stream.readline(MAX_CHARACTERS):
        number += 1
        if len(line) >= MAX_CHARACTERS:
            raise _too_long(path, number)
        yield line


def json_lines(stream: TextIO, path: Path) -> Iterator[tuple[int, Any, str]]:
    """Yield line number, value and problem of every line that is not blank.

    Raises:
        DataError: A line is longer than `MAX_CHARACTERS`.
    """
    for number, line in enumerate(lines_of(stream, path), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_value(line), ""
        except JSONDecodeError as error:
            yield number, None, f"broken JSON: {error.msg} (column {error.colno})."


def json_values(stream: TextIO, path: Path) -> Iterator[Any]:
    """Yield the items of an array, or values one after another, without reading the whole file into memory.

    Raises:
        DataError: The JSON is broken, or a value is longer than `MAX_CHARACTERS`; the message names the line.
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
                if at_end or len(text) - end > 2:  # "1." and "1e+" may continue in the next block
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
    """Return whether the next block may complete the value, so that an early mistake doesn't read the whole file."""
    return error.msg.startswith("Unterminated string") or len(error.doc) - error.pos < LONGEST_ATOM


def _too_long(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}:{number}: a row of more than {MAX_CHARACTERS >> 20} Mi characters; split it into several."
    )


def _broken(path: Path, text: str, position: int, lines_before: int, message: str) -> DataError:
    return DataError(f"{path}:{lines_before + text.count(chr(10), 0, position) + 1}: broken JSON: {message}.")
