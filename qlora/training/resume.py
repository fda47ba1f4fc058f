"""Where a run starts: at the beginning, or at a checkpoint that belongs to it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora.about import __version__
from qlora.checkpoint import RunDirectory, RunRecord, check_whole, newest_whole, step_of
from qlora.config import RunConfig, TrainSection, load_config
from qlora.errors import CheckpointError, ConfigError
from qlora.training.origin import (
    ACCUMULATION,
    LENGTH_KEYS,
    SCHEDULE_KEYS,
    STEP_SIZE,
    check_same_settings,
    compare_origins,
    describe_changes,
    describe_origin,
    flatten,
    micro_batches_of_step,
    read_checked_origin,
)
from qlora.training.schedule import rate_of

WAYS_OUT = "start over with --fresh, which keeps the old run under another name, or choose another train.output_dir."


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts, as the first process finds it.

    Attributes:
        checkpoint: Checkpoint to continue from; None for step 0.
        origins: Origin of the directory's run and of the checkpoint, by their paths; see
            :func:`qlora.training.origin.describe_origin`.
        damaged: Newer checkpoints that are skipped, and what is wrong with each.
        fresh: Whether a run in the directory is renamed first.
        is_done: Whether the directory's run is finished, and the config does not change the number of steps.
        config: Config of the earlier sessions: of the directory's run, or else of the checkpoint's.
        record: Record of the same run; None if there is none.
        started_from: Checkpoint of another run that the directory's run started from; None if it started at step 0.
        final_step: Step of the directory's final adapter, if its run was ever finished.
    """

    checkpoint: Path | None = None
    origins: dict[Path, dict[str, Any]] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)
    fresh: bool = False
    is_done: bool = False
    config: RunConfig | None = None
    record: RunRecord | None = None
    started_from: str | None = None
    final_step: int | None = None

    @property
    def finished_steps(self) -> int | None:
        """Number of steps of the earlier sessions' run; None if it is not finished."""
        return self.record.steps if self.record is not None and self.record.is_finished else None

    def describe_damage(self) -> list[str]:
        """Return a line for each checkpoint that is skipped."""
        start = self.checkpoint and self.checkpoint.name
        return [f"{path.name} is skipped, and {start} continued: {problem}" for path, problem in self.damaged.items()]

    def changes(self, config: RunConfig, keys: Iterable[str]) -> list[str]:
        """Return the differences of a config from that of the earlier sessions, for some keys."""
        if self.config is None:
            return []
        before, now = flatten(self.config), flatten(config)
        return describe_changes({key: before[key] for key in keys}, {key: now[key] for key in keys})

    def describe_processes(self, num_processes: int) -> list[str]:
        """Return a line if another number of processes trained in the earlier sessions."""
        before = None if self.record is None else self.record.in_use.processes
        if self.checkpoint is None or before in (None, num_processes):
            return []
        return [
            f"The run continues with {_count(num_processes)} instead of {before}: each step has the rows that it would "
            "have had, but sums are rounded in another order, and dropout draws other numbers."
        ]

    def describe_jump(self, section: TrainSection, step: int, total_steps: int) -> list[str]:
        """Return a line if the learning rate does not continue as it would have in the earlier sessions.

        Args:
            section: Training section of the run, with a number as learning rate.
            step: Number of steps that are done.
            total_steps: Number of steps of the run.
        """
        if self.config is None or self.record is None or not 0 < step < total_steps:
            return []
        length_before = self.record.total_steps
        before, rate = self.config.train, self.record.in_use.learning_rate
        before = before if rate is None else before.with_learning_rate(rate)
        earlier, now = rate_of(before, length_before), rate_of(section, total_steps)
        expected = earlier(min(step, length_before - 1))
        if abs(now(step) - expected) <= 0.01 * expected:
            return []
        reason = f", because the schedule now spans {total_steps} steps instead of {length_before}"
        return [
            f"The learning rate jumps from {earlier(step - 1):.3g} at step {step} to {now(step):.3g} at step "
            f"{step + 1}{reason if total_steps != length_before else ''}. To extend a finished run at a steady rate, "
            "set train.lr_scheduler=constant with the train.learning_rate of your choice. A run that will be extended "
            "is best trained with lr_scheduler constant, or with a floor (train.min_learning_rate), from its start."
        ]


def find_start(run: RunDirectory, config: RunConfig, resume: str, fresh: bool = False) -> Start:
    """Find the newest whole checkpoint, or the one that `resume` names.

    Args:
        run: Output directory, see :func:`check_folder`.
        config: Config of the run.
        resume: `auto`, or the path of a checkpoint or run.
        fresh: Start at step 0, even if the directory holds a run.

    Raises:
        ConfigError: The directory holds another run, or a finished one without a checkpoint to continue from, or the
            arguments contradict each other.
        CheckpointError: There is no whole checkpoint at the path, or none in the run.
    """
    if resume == "never":
        raise ConfigError("--resume never was replaced by --fresh, which keeps the old directory under another name.")
    if fresh and resume != "auto":
        raise ConfigError(f"--fresh and --resume {resume} can't be combined.")
    if not run.exists() and any(path.exists() for path in (run.config, run.adapter, run.checkpoints)):
        raise ConfigError(
            f"train.output_dir: {run.path} has a config.yaml, adapter or checkpoints, but no run.json, so it is not a "
            "run and they would be overwritten. Choose another folder."
        )
    if fresh:
        return Start(fresh=True)
    named = None if resume == "auto" else _named(resume)
    if not run.exists():
        return Start() if named is None else _at_foreign_checkpoint(named, config)

    before, record = load_config(run.config), run.read_record()
    start = Start(
        origins={run.path: describe_origin(before, record)},
        config=before,
        record=record,
        started_from=record.started_from,
        final_step=run.final_step,
    )
    is_finished = start.finished_steps is not None and run.adapter.is_dir()
    is_extended = is_finished and bool(start.changes(config, LENGTH_KEYS))
    check_same_settings(run.path, start.origins[run.path], config, SCHEDULE_KEYS if is_extended else set(), WAYS_OUT)
    if is_finished and not is_extended:
        return replace(start, is_done=True)
    if named is None or str(named) == start.started_from:
        checkpoint, damaged = newest_whole(run.list_checkpoints())
    else:
        checkpoint, damaged = named, {}
        _check_newest(run, named)
    if damaged and checkpoint is None:
        raise CheckpointError(
            f"No checkpoint of {run.path} is whole. Start over with --fresh, which keeps them:\n"
            + "\n".join(f"  {problem}" for problem in damaged.values())
        )
    if checkpoint is None and run.adapter.is_dir():
        raise ConfigError(
            f"{run.path} holds the adapter of a finished run, but no checkpoint to continue from. Start over with "
            "--fresh, which keeps it, or choose another train.output_dir."
        )
    if checkpoint is None:
        return start if named is None else replace(_at_foreign_checkpoint(named, config), origins=start.origins)
    # A run that was extended still has checkpoints of its old schedule; its config, checked above, has the new one.
    is_own = checkpoint.parent == run.checkpoints
    origin = read_checked_origin(checkpoint, config, SCHEDULE_KEYS if is_own else set(), WAYS_OUT)
    return replace(start, damaged=damaged, checkpoint=checkpoint, origins=start.origins | {checkpoint: origin})


def check_step_size(start: Start, config: RunConfig, num_processes: int) -> None:
    """Check that a step has as many micro-batches, over all processes, as in the earlier sessions.

    Raises:
        ConfigError: It has more or fewer.
    """
    now = num_processes * config.train.gradient_accumulation_steps
    for place, origin in ({} if start.is_done else start.origins).items():
        before = micro_batches_of_step(origin)
        if before in (None, now):
            continue
        each, rest = divmod(before, num_processes)
        remedy = (
            f"launch a number of processes that divides {before}, and set {ACCUMULATION} to the quotient"
            if rest
            else f"set {ACCUMULATION}: {each}"
        )
        raise ConfigError(
            f"{place} was trained with other settings:\n  {STEP_SIZE}: {before} → {now}\nFor {_count(num_processes)}, "
            f"{remedy}, {WAYS_OUT}"
        )


def _count(num_processes: int) -> str:
    return f"{num_processes} process{'es' if num_processes > 1 else ''}"


def check_folder(run: RunDirectory) -> None:
    """Check that output_dir can be used for a run.

    Raises:
        ConfigError: It or one of its folders is a file, or it holds a link to a file elsewhere, which a run would
            overwrite.
    """
    for folder in (run.path, run.adapter, run.checkpoints):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(
                f"train.output_dir: {folder} is a file and should be a folder; move it or choose another."
            )
    for path in run.path.glob("*"):
        if path.is_symlink() and not path.is_dir():
            raise ConfigError(
                f"train.output_dir: {path} is a link to {path.readlink()}; replace the link with the file."
            )


def check_same_origin(start: Start, now: dict[str, Any]) -> None:
    """Check that base, data and what is in use are still those that the run began with.

    Raises:
        ConfigError: They are not, so the next steps would not be those of one run.
    """
    for place, before in start.origins.items():
        if changes := compare_origins(before, now):
            version = __version__ if start.record is None else start.record.versions.get("qlora", __version__)
            hint = " (tiles follow from model.recompute)" if any(line.startswith("tiled:") for line in changes) else ""
            raise ConfigError(
                f"{place} was trained with a different base, data or setup{hint}:\n"
                + "\n".join(f"  {change}" for change in changes)
                + (f"\n  qlora: {version} → {__version__}" if version != __version__ else "")
                + f"\nUndo these changes, {WAYS_OUT}"
            )


def _at_foreign_checkpoint(checkpoint: Path, config: RunConfig) -> Start:
    """Return a start at a checkpoint of another run; its config and record are read if it is still in that run."""
    other = RunDirectory.find(checkpoint)
    record = None if other is None else other.read_record()
    # qlora 0.1.0 wrote the number of examples into the record only.
    examples = None if record is None else asdict(record.examples)
    origin = {"examples": examples} | read_checked_origin(checkpoint, config, set(), "or leave out --resume.")
    return Start(
        checkpoint=checkpoint,
        origins={checkpoint: origin},
        config=None if other is None else load_config(other.config),
        record=record,
        started_from=str(checkpoint),
    )


def _named(resume: str) -> Path:
    """Return the checkpoint that a path names: itself, or the last one of a run."""
    run = RunDirectory.find(resume)
    path: Path | None = Path(resume).expanduser() if run is None else run.adapter
    if run is not None and path == run.final_adapter:
        path, _ = newest_whole(run.list_checkpoints())
    if path is None or not (path / "manifest.json").is_file():
        raise CheckpointError(f"--resume {resume}: no checkpoint or run was found there.")
    check_whole(path)
    return path.absolute()


def _check_newest(run: RunDirectory, checkpoint: Path) -> None:
    step = step_of(checkpoint) or 0
    newer = [each.name for each in run.list_checkpoints() if (step_of(each) or 0) > step]
    if newer:
        raise ConfigError(
            f"{run.path} has newer checkpoints ({', '.join(newer)}). To start from {checkpoint.name}, choose another "
            "train.output_dir."
        )
