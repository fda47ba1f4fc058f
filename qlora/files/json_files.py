"""JSON objects from files that anyone may have written: read whole, or refused by their name."""

from pathlib import Path
from typing import Any

from qlora.errors import QLoRAError
from qlora.files.json_values import parse_value

# The most that safetensors allows for a header; configs, records and indices have far less.
MAX_BYTES = 100_000_000


def read_object(path: Path, error: type[QLoRAError], remedy: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: Of the file.
        error: Raised if it holds something else, or can't be read.
        remedy: What to do then.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        return parse_object(content)
    except (OSError, ValueError) as problem:
        raise error(f"{path} is damaged; {remedy} ({problem}).") from None


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object that a file's bytes stand for.

    Raises:
        ValueError: They stand for something else, for one that is nested too deeply, or are too many.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    value = parse_value(content.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"no object, but {value!r:.40}")
    return value
