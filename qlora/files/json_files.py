"""JSON objects from untrusted files; a damaged file is refused with its name."""

from pathlib import Path
from typing import Any

from qlora.errors import QLoRAError
from qlora.files.json_values import parse_value

# safetensors' limit for a header; configs, records and indices are far smaller.
MAX_BYTES = 100_000_000


def read_object(path: Path, error: type[QLoRAError], remedy: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        error: Type of the error raised if the file has anything else, or can't be read.
        remedy: What to do then, for the message.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        return parse_object(content)
    except (OSError, ValueError) as problem:
        raise error(f"{path} is damaged; {remedy} ({problem}).") from None


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse the JSON object in a file's bytes.

    Raises:
        ValueError: The bytes are not a JSON object, the object is nested too deeply, or the file is too large.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    value = parse_value(content.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"not an object: {value!r:.40}")
    return value
