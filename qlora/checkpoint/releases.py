"""What a run was released as: its merges and their verification, a line each in releases.jsonl."""

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from qlora.checkpoint.run_dir import RunDirectory
from qlora.files.json_files import parse_object

KINDS = ("merge", "verify")


def record_release(run: RunDirectory, kind: str, values: Mapping[str, Any]) -> None:
    """Append a merge or a verification to the run's releases.jsonl; a run that can't be written stays as it is.

    Args:
        run: The run.
        kind: `merge` or `verify`.
        values: Values of the report.
    """
    assert kind in KINDS, kind
    line = json.dumps({"kind": kind, "time": datetime.now(UTC).isoformat(timespec="seconds"), **values}, default=str)
    with suppress(OSError), run.releases.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_releases(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the lines of a run's releases.jsonl; damaged ones are left out, since nothing depends on them."""
    found = []
    content = run.releases.read_bytes() if run.releases.is_file() else b""
    for line in content.splitlines():
        with suppress(ValueError):
            found.append(parse_object(line))
    return [line for line in found if line.get("kind") in KINDS]
