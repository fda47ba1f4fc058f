"""Values of a row's columns, read with their type checked."""

import json
from typing import Any

from qlora.data.rows import Row
from qlora.errors import DataError
from qlora.files.json_values import parse_value


def text_of(row: Row, column: str) -> str:
    """Read a column of text.

    Raises:
        DataError: It is absent, not text, or can't be encoded.
    """
    value = row.values.get(column)
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: column '{column}' should be text, not {value!r:.80}.")
    return check_unicode(row, value)


def numbers_of(row: Row, column: str, length: int | None = None) -> list[Any]:
    """Read a column with a list of numbers.

    Raises:
        DataError: It isn't such a list, or has another length than `length`, the number of input ids.
    """
    values = row.values.get(column)
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise DataError(f"{row.origin}: '{column}' should be a list of numbers, not {values!r:.80}.")
    if length is not None and len(values) != length:
        raise DataError(f"{row.origin}: '{column}' has {len(values)} entries, but there are {length} input_ids.")
    return values


def parse_json(row: Row, name: str, text: str) -> Any:
    """Parse JSON inside a column.

    Raises:
        DataError: It is not valid JSON.
    """
    try:
        return parse_value(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{row.origin}: '{name}' should be JSON, not {text!r:.80} ({error}).") from None


def check_unicode(row: Row, text: Any) -> str:
    """Check that a value is text that can be encoded: JSON may have halves of surrogate pairs, which break tokenizers.

    Raises:
        DataError: It is not.
    """
    if not isinstance(text, str):
        raise DataError(f"{row.origin}: a turn's content should be text or parts, not {text!r:.80}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.origin}: character {error.start} of {text!r:.40} is half a surrogate pair.") from None
    return text
