"""The directory of a run: what lies where, and its records."""

import json
import re
from pathlib import Path
from typing import Any

from qlora.checkpoint.atomic import write_text
from qlora.errors import CheckpointError

# Without these a record tells too little to continue, merge or verify.
RECORD_KEYS = ("status", "base", "quantization", "in_use", "parameters", "data")


class RunDirectory:
    """Paths and records of one run.

    Args:
        path: The run's output_dir.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.record = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """A run that is there.

        Raises:
            CheckpointError: The folder holds no run.
        """
        run = cls(path)
        if not run.exists():
            raise CheckpointError(f"{path} is no run directory: it has no config.yaml and run.json.")
        return run

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file() and self.record.is_file()

    def checkpoint(self, step: int) -> Path:
        """Where the state after a step lies."""
        return self.checkpoints / f"step-{step:06d}"

    def list_checkpoints(self) -> list[Path]:
        """Checkpoints, the oldest first."""
        steps = {path: step_of(path) for path in self.checkpoints.glob("step-*")}
        return sorted((path for path, step in steps.items() if step is not None), key=lambda path: steps[path] or 0)

    def read_record(self) -> dict[str, Any]:
        """What run.json says.

        Raises:
            CheckpointError: It is broken.
        """
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.record} can't be read: {error}") from error
        missing = [key for key in RECORD_KEYS if not isinstance(record, dict) or key not in record]
        if missing:
            raise CheckpointError(f"{self.record} lacks {', '.join(missing)}; it was not written by qlora train.")
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Replaces run.json."""
        write_text(self.record, json.dumps(record, indent=2) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last one that a killed process left unfinished is passed over.

        Raises:
            CheckpointError: Another line is broken.
        """
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        values = []
        for number, line in enumerate(lines, start=1):
            try:
                values.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise CheckpointError(f"{self.metrics}:{number} is damaged: {error}") from None
        return values

    def keep_metrics_until(self, step: int) -> None:
        """Drops the lines after a step: what was logged after the checkpoint that a run continues from."""
        lines = [line for line in self.read_metrics() if line["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's folder is named after, if it is named so."""
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return int(match[1]) if match else None
