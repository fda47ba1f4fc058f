"""The directory of a run: its paths, record and metrics."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora.checkpoint.record import RunRecord, read_record
from qlora.checkpoint.state import check_whole
from qlora.errors import CheckpointError
from qlora.files.atomic import discard, make_folder, old_name, settle, sync, write_text
from qlora.files.json_files import parse_object

# Numbers in a line of metrics.jsonl, besides the step that every line has.
NUMBERS = ("loss", "eval_loss", "retain_loss", "tokens_per_second", "peak_memory")


class RunDirectory:
    """Paths and records of one run.

    Args:
        path: The run's output_dir.

    Attributes:
        adapter: Folder of the adapter to read: the final one, the best checkpoint, or the one that :meth:`open` was
            given.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.record = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.releases = self.path / "releases.jsonl"
        self.page = self.path / "report.html"
        self.starts = self.path / "starts.safetensors"
        self.labels = self.path / "labels.json"
        self.final_adapter = self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.trial = self.checkpoints / "trial"
        self.lock = self.path / "run.lock"

    @classmethod
    def find(cls, path: str | Path) -> "RunDirectory | None":
        """Return the run whose output_dir, final adapter or checkpoint a path is; None for other paths.

        Raises:
            CheckpointError: The run has no such checkpoint.
        """
        path = Path(path).expanduser()
        absolute = path.absolute()
        if cls(path).exists():
            return cls(path)
        for folder in (absolute.parent, absolute.parent.parent):
            run = cls(folder)
            is_checkpoint = absolute.parent == run.checkpoints and step_of(absolute) is not None
            if run.exists() and (absolute == run.adapter or is_checkpoint):
                if not absolute.is_dir():
                    there = ", ".join(each.name for each in run.list_checkpoints()) or "none"
                    raise CheckpointError(f"{absolute} does not exist; the checkpoints of {run.path} are: {there}.")
                run.adapter = absolute
                return run
        return None

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """Open the run of a path, see :meth:`find`; if the run keeps its best checkpoint, its adapter is that one.

        Raises:
            CheckpointError: There is no run, the run is not finished and the path is not one of its checkpoints, or the
                checkpoint is damaged.
        """
        run = cls.find(path)
        if run is None:
            raise CheckpointError(
                f"{path} is not a run, its adapter/ or one of its checkpoints; a run has a config.yaml and a run.json."
            )
        if run.adapter != run.final_adapter:
            check_whole(run.adapter)
            return run
        if cls(path).exists() or run.final_step is None:
            run._check_finished()
        best = run.read_record().best
        if cls(path).exists() and best is not None:
            run.adapter = run.checkpoint(best.step)
            check_whole(run.adapter)
        return run

    def choose(self, which: str) -> Path:
        """Return the folder of an adapter of the run.

        Args:
            which: `best`, `last`, or the step of a checkpoint.

        Raises:
            CheckpointError: There is no such adapter.
        """
        record, checkpoints = self.read_record(), self.list_checkpoints()
        if which == "best":
            if record.best is None:
                raise CheckpointError(
                    f"--checkpoint best: {self.path} keeps none; set train.keep_best: true before it is trained."
                )
            return self.checkpoint(record.best.step)
        if which == "last":
            if record.is_finished or not checkpoints:
                return self.final_adapter
            return checkpoints[-1]
        if not which.isdecimal():
            raise CheckpointError(f"--checkpoint {which!r:.80} should be best, last, or the step of a checkpoint.")
        folder = self.checkpoint(int(which))
        return self.final_adapter if not folder.is_dir() and self.final_step == int(which) else folder

    @property
    def step(self) -> int:
        """Number of optimizer steps that the adapter was trained for."""
        step = step_of(self.adapter)
        return step if step is not None else self.final_step or 0

    @property
    def final_step(self) -> int | None:
        """Number of optimizer steps that the final adapter was trained for; None if there is none.

        A run that is being extended keeps its previous final adapter until it finishes again.
        """
        record = self.read_record()
        return record.steps if record.is_finished else record.final_step

    def exists(self) -> bool:
        """Return whether a run was started here."""
        return self.config.is_file() and self.record.is_file()

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after a step."""
        return self.checkpoints / f"step-{step:06d}"

    def replay(self, step: int) -> Path:
        """Return the file that a failed step is saved in for a replay."""
        return self.path / "replay" / f"step-{step:06d}.safetensors"

    def list_checkpoints(self) -> list[Path]:
        """Return the folders of the checkpoints, the oldest first."""
        steps = {path: step_of(path) for path in self.checkpoints.glob("step-*")}
        return sorted((path for path, step in steps.items() if step is not None), key=lambda path: steps[path] or 0)

    def clear_leftovers(self) -> None:
        """Recover from interrupted writes; only for the process that holds the lock."""
        for target in (
            self.config,
            self.record,
            self.metrics,
            self.samples,
            self.page,
            self.starts,
            self.labels,
            self.adapter,
            self.trial,
        ):
            settle(target)
        if self.trial.exists():
            discard(self.trial)
        for leftover in self.checkpoints.glob(".step-*"):
            if match := re.fullmatch(r"\.(step-\d+)\.(new|old|gone)", leftover.name):
                settle(self.checkpoints / match[1])

    def read_record(self) -> RunRecord:
        """Read run.json.

        Raises:
            CheckpointError: The file is damaged.
        """
        return read_record(self.record)

    def write_record(self, record: RunRecord) -> None:
        """Replace run.json."""
        write_text(self.record, json.dumps(record.as_dict(), indent=2) + "\n")

    def move_aside(self) -> Path:
        """Move the directory's contents, except the lock, into a new folder next to it, and return that folder.

        The record is moved last, so that the directory is still a run if the process is killed.

        Raises:
            CheckpointError: A file can't be moved.
        """
        target = old_name(self.path)
        try:
            make_folder(target)
            for path in sorted(self.path.iterdir(), key=lambda path: (path == self.record, path == self.config)):
                if path != self.lock:
                    path.rename(target / path.name)
            sync(target)
            sync(self.path)
        except OSError as problem:
            with suppress(OSError):  # a folder with moved files stays
                target.rmdir()
            raise CheckpointError(f"{self.path} can't be moved to {target}: {problem}.") from problem
        return target

    def read_metrics(self, until: int | None = None) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, without a last line that a killed process left unfinished.

        Args:
            until: Last step to read; later lines may be damaged. None for all.

        Raises:
            CheckpointError: Another line is damaged.
        """
        return _read_lines(self.metrics, until)

    def read_samples(self, until: int | None = None) -> list[dict[str, Any]]:
        """Return the lines of samples.jsonl without damaged ones, which training does not depend on.

        Args:
            until: Last step to read. None for all.
        """
        return _read_lines(self.samples, until, skips_damage=True)

    def keep_logs_until(self, step: int) -> None:
        """Drop the lines after a step, which were logged after the checkpoint that the run continues from.

        Raises:
            CheckpointError: A line of metrics.jsonl up to that step is damaged.
        """
        logs = {self.metrics: self.read_metrics(step)}
        if self.samples.exists():
            logs[self.samples] = self.read_samples(step)
        for path, lines in logs.items():
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def _check_finished(self) -> None:
        if self.read_record().is_finished:
            return
        adapters = self.list_checkpoints()[-1:]
        if self.final_step is not None:
            adapters.append(self.final_adapter)
        instead = f", or name the adapter to use: {' or '.join(map(str, adapters))}" if adapters else ""
        raise CheckpointError(f"{self.path} has not finished. Continue it with qlora train{instead}.")


def _read_lines(path: Path, until: int | None, skips_damage: bool = False) -> list[dict[str, Any]]:
    """Return the lines of a log of steps; see :meth:`RunDirectory.read_metrics` and `read_samples`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_object(line.encode())
            if not all(isinstance(value[key], int | float) for key in {"step", *NUMBERS} & {"step", *value}):
                raise ValueError("no numbers")
        except (ValueError, KeyError) as error:
            if skips_damage or number == len(lines):
                continue
            raise CheckpointError(f"{path}:{number} is damaged: {error}") from None
        if until is not None and value["step"] > until:
            break
        values.append(value)
    return values


def step_of(checkpoint: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for other folders."""
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return int(match[1]) if match else None
