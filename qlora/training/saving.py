"""Saves of a run: a check for space, a trial before the first step, and the handling of failed saves."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.checkpoint import (
    RunDirectory,
    RunRecord,
    adapter_bytes,
    checkpoint_bytes,
    drop_old_checkpoints,
    save_checkpoint,
)
from qlora.errors import CheckpointError
from qlora.files import discard, free_bytes, sync
from qlora.lora import starts_to_tensors
from qlora.training.metrics import MetricsLog
from qlora.training.plan import Assembly
from qlora.training.progress import Progress
from qlora.training.schedule import resolve_interval

# Consecutive saves that may fail before the run stops.
MAX_FAILURES = 3


class Saver:
    """Save a run's state; on every process but the first it does nothing.

    Args:
        run: Directory of the run.
        assembly: Parts of the run.
        origin: Everything that determines the run's steps, see :func:`qlora.training.origin.describe_origin`.
        log: Log of the run, which is written before every checkpoint and shows messages.

    Attributes:
        best: The best checkpoint, which is kept.
    """

    def __init__(self, run: RunDirectory, assembly: Assembly, origin: dict[str, Any], log: MetricsLog) -> None:
        self.run, self.assembly, self.origin, self.log = run, assembly, origin, log
        self.best: Path | None = None
        self._failures = 0

    def try_save(self, progress: Progress) -> None:
        """Save once and remove the checkpoint, so that a missing permission or a full disk is found before training.

        Raises:
            CheckpointError: Saving failed.
        """
        if self.assembly.processes.is_first:
            self._write(self.run.trial, progress)
            discard(self.run.trial)

    def save(self, progress: Progress, is_last: bool) -> Path | None:
        """Save the state after a step, and remove the oldest checkpoints.

        If a save fails before the last step, the failure is shown and the run continues until the next one, which may
        find space; earlier checkpoints stay.

        Args:
            progress: Progress of the run.
            is_last: Whether no step follows in this session.

        Returns:
            The checkpoint; None if it was not saved, or by another process.

        Raises:
            CheckpointError: The save failed, and either it is the last one or the two before failed too.
        """
        if not self.assembly.processes.is_first:
            return None
        folder = self.run.checkpoint(progress.step)
        try:
            if not self.run.record.is_file():
                raise CheckpointError(f"{self.run.path} was removed or unmounted during the run.")
            self._write(folder, progress)
        except CheckpointError as problem:
            checkpoints = self.run.list_checkpoints()
            last = f"{checkpoints[-1].name} is the last one saved." if checkpoints else "Nothing is saved yet."
            self._bear(f"Step {progress.step} could not be saved, and {last}", problem, is_last)
            return None
        self._failures = 0
        self.drop_old(progress.step)
        return folder

    def save_record(self, record: RunRecord, step: int) -> None:
        """Write run.json with the best checkpoint, and remove the oldest; a failure counts like that of a save.

        Args:
            record: The record.
            step: Number of steps done.

        Raises:
            CheckpointError: It can't be written, and the two saves before failed too.
        """
        try:
            self.run.write_record(record)
        except CheckpointError as problem:
            self._bear(f"Step {step} is saved and the best so far, but not recorded as such.", problem, False)
        else:
            self.drop_old(step)

    def _bear(self, message: str, problem: CheckpointError, is_last: bool) -> None:
        """Count and show a failed save, or raise it if no other will follow or too many failed."""
        self._failures += 1
        if is_last or self._failures >= MAX_FAILURES:
            raise CheckpointError(f"{message} {problem}") from problem
        self.log.announce([f"{message} {problem} The run continues and saves again at the next interval."])

    def drop_old(self, step: int) -> None:
        """Remove the oldest checkpoints, but not the best."""
        keep = self.assembly.config.train.keep_checkpoints
        try:
            drop_old_checkpoints(self.run.list_checkpoints(), keep, self.best)
        except CheckpointError as problem:  # the new checkpoint is whole, so only space is lost
            self.log.announce([f"Step {step} is saved. {problem} Removal is retried at the next save."])

    def _write(self, folder: Path, progress: Progress) -> None:
        try:
            self.log.write_out()
            for path in (self.run.metrics, self.run.samples):  # a power cut must not leave a checkpoint without its log
                if path.exists():
                    sync(path)
        except OSError as problem:
            raise CheckpointError(f"The logs in {self.run.path} can't be written: {problem}.") from problem
        model, optimizer, ranks = self.assembly.model, self.assembly.optimizer, self.assembly.ranks
        base_name = self.assembly.config.model.base
        save_checkpoint(
            folder, model, optimizer, asdict(progress), base_name=base_name, origin=self.origin, ranks=ranks
        )


def check_room(run: RunDirectory, assembly: Assembly, checkpoints: list[Path]) -> None:
    """Check that there is space for everything that the rest of a run writes.

    Args:
        run: Directory of the run.
        assembly: Parts of the run.
        checkpoints: Checkpoints of the run so far.

    Raises:
        CheckpointError: There is too little; the error names the path, the bytes needed and those that are free.
    """
    section = assembly.config.train
    total = assembly.plan.total_steps
    every = resolve_interval(section.save_every, total) or total
    # The oldest is removed once the newest is whole, so for a moment there is one more than is kept.
    num_kept = min(section.keep_checkpoints + 1, -(-total // every))
    if section.best_metric is not None:  # the best one is saved after any evaluation
        num_kept = min(section.keep_checkpoints + 2, total)
    num_new = max(1, num_kept - len(checkpoints))
    checkpoint = checkpoint_bytes(assembly.model, assembly.optimizer, assembly.ranks)
    tokenizer = sum(path.stat().st_size for path in assembly.files.folder.glob("tokenizer*"))
    starts = sum(tensor.nbytes for tensor in starts_to_tensors(assembly.starts).values())
    needed = num_new * checkpoint + adapter_bytes(assembly.model) + tokenizer + starts
    free = free_bytes(run.path)
    if needed > free:
        raise CheckpointError(
            f"train.output_dir: {run.path} needs space for {num_new} checkpoints of {checkpoint / 1e6:.1f} MB and the "
            f"final adapter, {needed / 1e6:.1f} MB in all, but only {free / 1e6:.1f} MB are free. Free space, lower "
            f"train.keep_checkpoints ({section.keep_checkpoints}), or choose another train.output_dir."
        )
