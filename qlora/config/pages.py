"""The reference as files: a Markdown page, a config with every key, a JSON Schema."""

import json
import textwrap

from qlora.config.reference import SOURCE, Key, group_meanings, json_schema, list_keys

WIDTH = 100


def reference_page() -> str:
    """Return `docs/config.md`: every key as a table row, one table per section."""
    lines = [
        "# Configuration",
        "",
        "Every key of a config: type, default, range, meaning and an example. `qlora explain KEY` prints the same in a "
        "terminal, `qlora init --all -o FILE` writes a config with every key, and `qlora init --schema -o FILE` a JSON "
        "Schema that editors complete and check with.",
        "",
        "Unknown keys are rejected with the closest valid name. `section.key=value` on the command line overrides the "
        "file, which overrides the defaults. Configs of other trainers: [arriving.md](arriving.md).",
        "",
        "This page is generated: `python -m scripts.dev.config_page` writes it again.",
    ]
    keys = list_keys()
    for group, meaning in group_meanings().items():
        title = "A source in `data.train`, `data.eval` or `data.retain`" if group == SOURCE else f"`{group}`"
        lines += [
            "",
            f"## {title}",
            "",
            meaning,
            "",
            "| key | type | default | meaning | example |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(key) for key in keys if key.group == group]
    return "\n".join(lines) + "\n"


def full_config() -> str:
    """Return a config with every key at its default, each with a comment; required keys have their example."""
    lines = [
        "# Every key at its default. Set model.base, data.train and train.output_dir, and delete what you don't need.",
        "# `qlora explain KEY` prints more about a key.",
    ]
    keys = list_keys()
    for group, meaning in group_meanings().items():
        if group == SOURCE or "." in group:
            owner = "A source in data.train, data.eval or data.retain" if group == SOURCE else group
            lines += ["", f"# {meaning}", f"# {owner} may have:"]
            lines += [f"#   {key.key}: {key.example}" for key in keys if key.group == group]
            continue
        lines += ["", f"# {meaning}", f"{group}:"]
        for key in (key for key in keys if key.group == group):
            lines += textwrap.wrap(
                f"{key.meaning} ({key.type}{f'; {key.range}' if key.range else ''})",
                WIDTH,
                initial_indent="  # ",
                subsequent_indent="  # ",
                break_long_words=False,
            )
            lines.append(f"  {key.key}: {key.example if key.default is None else key.default}")
    return "\n".join(lines) + "\n"


def schema_text() -> str:
    """Return the JSON Schema of a config as text."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def describe(key: Key) -> str:
    """Return a key as lines for a terminal."""
    rows = {
        "type": key.type,
        "range": key.range,
        "default": "none: it is required" if key.default is None else key.default,
        "example": f"{key.key}: {key.example}",
    }
    wrapped = textwrap.wrap(key.meaning, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([key.name, *wrapped, *(f"  {name:<8} {text}" for name, text in rows.items() if text)])


def _row(key: Key) -> str:
    kind = f"{key.type}, {key.range}" if key.range else key.type
    default = "required" if key.default is None else f"`{key.default}`"
    cells = [f"`{key.key}`", kind, default, key.meaning, f"`{key.example}`"]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
