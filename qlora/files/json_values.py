"""JSON values from text that anyone may have written: parsed strictly, and no deeper than can be walked."""

import json
from json import JSONDecodeError
from typing import Any

WHITESPACE = " \t\r\n"
# Deeper values are nobody's data, and break code that walks through them by recursion.
MAX_DEPTH = 100
_DECODER = json.JSONDecoder()


def parse_value(text: str) -> Any:
    """Parses the one value that a text holds.

    Raises:
        JSONDecodeError: It does not, or its value is one that can't be worked with.
    """
    value, end = decode_value(text, len(text) - len(text.lstrip(WHITESPACE)))
    if text[end:].strip(WHITESPACE):
        raise JSONDecodeError("Extra data", text, end)
    return value


def decode_value(text: str, position: int) -> tuple[Any, int]:
    """A value and where it ends; whatever is wrong with it is a JSONDecodeError."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except RecursionError:
        raise JSONDecodeError("it is nested too deeply", text, position) from None
    except JSONDecodeError:
        raise
    except ValueError:
        raise JSONDecodeError("a number has too many digits", text, position) from None
    brackets = text.count("[", position, end) + text.count("{", position, end)
    if brackets > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise JSONDecodeError("it is nested too deeply", text, position)
    return value, end


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return not depth or any(
        _is_deeper(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value)
    )
