"""Writing a draft as a commented config."""

import textwrap
from typing import Any

from qlora.config.convert.draft import Draft, one_line
from qlora.config.reference import as_yaml
from qlora.config.sections import RunConfig

WIDTH = 110


def config_text(draft: Draft, source: str) -> str:
    """Return the draft as YAML: what to check at the top, then the sections, then what was dropped and why.

    Args:
        draft: Draft with a value for every required key.
        source: Name of the file that was converted.
    """
    lines = [f"# Converted from {one_line(source)}, a config of {draft.trainer}."]
    if draft.warnings:
        lines += ["#", "# Check these first:"]
        for warning in draft.warnings:
            lines += _wrap(warning, "#   - ", "#     ")
    for section in RunConfig.model_fields:
        keys = {key: value for key, value in draft.values.items() if key.startswith(f"{section}.")}
        if keys:
            lines += ["", f"{section}:"]
            for key, value in keys.items():
                lines += _entry(key.partition(".")[2], value, draft.comments[key])
    lines += ["", *(f"# {line}" if line else "#" for line in summary_lines(draft))]
    return "\n".join(lines) + "\n"


def summary_lines(draft: Draft) -> list[str]:
    """Return what was dropped and why, what was off, and what is unknown, as lines."""
    lines: list[str] = []
    by_reason: dict[str, list[str]] = {}
    for name, reason in draft.dropped.items():
        by_reason.setdefault(reason, []).append(name)
    if by_reason:
        lines.append("Dropped:")
        for reason, names in by_reason.items():
            lines += _wrap(f"{', '.join(names)}: {reason}", "  ", "    ")
    if draft.off:
        lines += _wrap(f"Empty or off in the original: {', '.join(draft.off)}", "", "  ")
    if draft.unknown:
        lines += _wrap(f"Unknown to qlora, so dropped: {', '.join(draft.unknown)}", "", "  ")
    return lines or ["Nothing was dropped."]


def _entry(name: str, value: Any, comment: str) -> list[str]:
    note = "" if comment == name else f"  # {one_line(comment)}"
    is_sources = isinstance(value, list) and value and isinstance(value[0], dict)
    if is_sources and (len(value) > 1 or len(value[0]) > 1):
        return [f"  {name}:{note}", *(f"    - {as_yaml(_short(source))}" for source in value)]
    return [f"  {name}: {as_yaml(_short(value[0]) if is_sources else value)}{note}"]


def _short(source: dict[str, Any]) -> Any:
    """Return a source that has nothing but a path as its path."""
    return source["path"] if len(source) == 1 else source


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(one_line(text), WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False)
