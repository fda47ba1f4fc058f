"""A check that a config's run, stopped and continued on this machine, equals the same run without a stop."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora.checkpoint import RunDirectory
from qlora.config import EvalSection, RunConfig, absolute_paths
from qlora.errors import CheckpointError
from qlora.training.metrics import VOLATILE
from qlora.training.run import RunResult, train

# Number of steps of the run, which is stopped after half of them.
STEPS = 4


@dataclass(frozen=True, slots=True)
class ResumeCheck:
    """Result of the check.

    Attributes:
        matches: Whether the continued run left the same bytes and the same log.
        steps: Number of steps trained.
        stopped_after: Step after which the run was stopped.
        differing: Files and logged values that differ.
        repeats: Whether a second run without a stop equals the first; None if it was not needed.
    """

    matches: bool
    steps: int
    stopped_after: int
    differing: list[str]
    repeats: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def check_resume(config: RunConfig) -> ResumeCheck:
    """Train a few steps twice, once with a stop, and compare the files and logs.

    Everything is written to a temporary folder next to the config's output_dir, and removed; a run in output_dir is
    not touched. Each session is a process of its own, as after a reboot.

    Raises:
        QLoRAError: The config's run can't be started.
    """
    config = absolute_paths(config)
    parents = Path(config.train.output_dir).expanduser().parents
    parent = next(each for each in parents if each.is_dir())
    try:
        temporary = TemporaryDirectory(prefix=".check-resume-", dir=parent)
    except OSError as error:
        raise CheckpointError(f"{parent} can't be written: {error}; choose another train.output_dir.") from error
    with temporary as folder:
        whole, stopped, again = (RunDirectory(Path(folder) / name) for name in ("whole", "stopped", "again"))
        _train_in_process(config, whole)
        _train_in_process(config, stopped, STEPS // 2)
        _train_in_process(config, stopped)
        differing = _differing(stopped, whole)
        repeats = None
        if differing:
            _train_in_process(config, again)
            repeats = not _differing(again, whole)
    return ResumeCheck(not differing, STEPS, STEPS // 2, differing, repeats)


def _train_in_process(config: RunConfig, run: RunDirectory, stop_at: int | None = None) -> RunResult:
    """Train in a new process, which shares only the disk with the others."""
    values = {"output_dir": str(run.path), "max_steps": STEPS, "eval_every": 2, "save_every": None, "log_every": 1}
    values |= {"early_stopping": None, "keep_best": False, "best_mode": None, "samples": None}
    section = config.train.model_copy(update=values | {"trackers": []})
    config = config.model_copy(update={"train": section, "eval": EvalSection()})
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(train, config, "auto", stop_at).result()


def _differing(run: RunDirectory, expected: RunDirectory) -> list[str]:
    names = sorted(path.relative_to(expected.path) for path in _files(expected))
    found = {path.relative_to(run.path) for path in _files(run)}
    differing = [str(name) for name in names if name not in found or _bytes(run, name) != _bytes(expected, name)]
    for line, other in zip(run.read_metrics(), expected.read_metrics(), strict=False):
        differing += [
            f"step {other['step']}, {key}: {line.get(key)!r}, but {value!r} in the run that was not stopped"
            for key, value in other.items()
            if key not in VOLATILE and line.get(key) != value
        ]
    if len(run.read_metrics()) != len(expected.read_metrics()):
        differing.append("metrics.jsonl: number of lines")
    return differing


def _files(run: RunDirectory) -> list[Path]:
    """Return the files of the trained adapter and of the last checkpoint."""
    return [path for folder in (run.adapter, run.checkpoint(STEPS)) for path in folder.rglob("*") if path.is_file()]


def _bytes(run: RunDirectory, name: Path) -> bytes:
    return (run.path / name).read_bytes()
