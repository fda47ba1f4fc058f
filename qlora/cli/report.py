"""Reports on the screen: aligned lines for people, or one JSON object."""

import json
from collections.abc import Mapping
from typing import Any


def show_report(values: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """Prints a report on standard output."""
    if as_json:
        print(as_json_text(values))
        return
    if title:
        print(title)
    width = max(map(len, values), default=0)
    for key, value in values.items():
        print(f"  {key.replace('_', ' '):<{width}}  {_format(value)}")


def as_json_text(values: Mapping[str, Any]) -> str:
    """Return a report as one JSON object."""
    return json.dumps(values, default=str)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_format(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_format, value)) or "none"
    return str(value)
