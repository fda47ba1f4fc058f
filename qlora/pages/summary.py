"""A run in one line: how far it is, how good, how large; and the runs of a folder."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora.checkpoint import RunDirectory, RunRecord
from qlora.config import RunConfig, load_config
from qlora.files.lock import is_held
from qlora.pages.curves import is_number

# Depth of folders in which runs are looked for.
DEPTH = 3


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run in one line; values that are not known are None.

    Attributes:
        run: Absolute path of the run.
        status: `running`, `interrupted` or `finished`; a run that no process holds any more is interrupted.
        step: Number of optimizer steps done.
        total_steps: Number of optimizer steps of the whole run.
        best_loss: Lowest held-out loss after step 0.
        best_step: Step of it.
        loss: Training loss of the last logged step.
        learning_rate: Peak learning rate.
        rank: Rank of the adapters.
        seconds: Time in training steps, without evaluations and saves.
        size: Bytes of the run's files.
        peak_memory: Peak memory in bytes.
        tokens_per_second: Mean speed of training.
    """

    run: str
    status: str
    step: int
    total_steps: int
    best_loss: float | None
    best_step: int | None
    loss: float | None
    learning_rate: float | None
    rank: int
    seconds: float
    size: int
    peak_memory: int | None
    tokens_per_second: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def find_runs(folder: Path) -> list[RunDirectory]:
    """Return the runs in a folder and in the folders inside it, by path."""
    patterns = ["/".join(["*"] * depth + ["run.json"]) for depth in range(1, DEPTH + 1)]
    found = (RunDirectory(path.parent) for pattern in patterns for path in folder.glob(pattern))
    return sorted((run for run in found if run.exists()), key=lambda run: run.path)


def summarize(run: RunDirectory) -> RunSummary:
    """Return a run in one line.

    Raises:
        QLoRAError: A file of the run is damaged.
    """
    return summary_of(run, load_config(run.config), run.read_record(), run.read_metrics())


def summary_of(
    run: RunDirectory, config: RunConfig, record: RunRecord, lines: Sequence[Mapping[str, Any]]
) -> RunSummary:
    """Return a run in one line.

    Args:
        run: The run.
        config: Its config.
        record: Its record.
        lines: Lines of its metrics.jsonl.
    """
    held_out = {line["step"]: line["eval_loss"] for line in lines if line["step"] and is_number(line.get("eval_loss"))}
    best_step = min(held_out, key=lambda step: held_out[step], default=None)
    trained = [line for line in lines if is_number(line.get("loss"))]
    tokens, seconds = _work(trained)
    rate = record.in_use.learning_rate
    if rate is None and is_number(config.train.learning_rate):  # in records of qlora 0.1.0
        rate = config.train.peak
    return RunSummary(
        run=str(run.path.resolve()),
        status="interrupted" if record.status == "running" and not is_held(run.lock) else record.status,
        step=record.steps if record.steps is not None else lines[-1]["step"] if lines else 0,
        total_steps=record.total_steps,
        best_loss=None if best_step is None else held_out[best_step],
        best_step=best_step,
        loss=trained[-1]["loss"] if trained else None,
        learning_rate=rate,
        rank=config.lora.rank,
        seconds=seconds,
        size=_size(run.path),
        peak_memory=max((line["peak_memory"] for line in trained if "peak_memory" in line), default=None),
        tokens_per_second=tokens / seconds if seconds else None,
    )


def _work(trained: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """Return the tokens of logged steps, and the seconds that they took: the speed of a line is of all since the last.

    Args:
        trained: Lines of training steps.
    """
    total, seconds, before = 0, 0.0, 0
    for line in trained:
        speed, tokens = line.get("tokens_per_second"), line.get("tokens")
        if speed and is_number(tokens):
            total, seconds, before = total + int(tokens) - before, seconds + (tokens - before) / speed, int(tokens)
    return total, seconds


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files; of a run that is training, files may come and go."""
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, it passes over a folder that disappears
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total
