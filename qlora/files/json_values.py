"""JSON values from untrusted text, parsed strictly and with limited nesting."""

import json
from json import JSONDecodeError
from typing import Any

WHITESPACE = " \t\r\n"
# No real data is nested deeper, and recursive code fails on deeper values.
MAX_DEPTH = 100
_DECODER = json.JSONDecoder()


def parse_value(text: str) -> Any:
    """Parse a text that consists of one value.

    Raises:
        JSONDecodeError: The text is not exactly one value, or the value is nested too deeply.
    """
    value, end = decode_value(text, len(text) - len(text.lstrip(WHITESPACE)))
    if text[end:].strip(WHITESPACE):
        raise JSONDecodeError("Extra data", text, end)
    return value


def decode_value(text: str, position: int) -> tuple[Any, int]:
    """Parse the value at a position, and return it and the position of its end.

    Raises:
        JSONDecodeError: There is no value, or it is nested too deeply.
    """
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
