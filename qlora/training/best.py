"""The best evaluation of a run, and whether it is time to stop."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.checkpoint import Best, evaluation_metrics, mode_of
from qlora.config import TrainSection
from qlora.errors import ConfigError
from qlora.model import Loss


@dataclass(slots=True)
class BestWatch:
    """Follows a metric over the evaluations of a run; the state follows from the lines of metrics.jsonl.

    Attributes:
        metric: Name of the metric in metrics.jsonl; None if nothing is followed.
        mode: `min` or `max`: the metric's best value; None for what is known of it.
        patience: Number of evaluations without an improvement after which the run stops; None for never.
        min_delta: Least change that is an improvement for `patience`.
        after: Evaluations up to this step don't count for `patience`: the step of an earlier early stop.
        best: The best evaluation whose checkpoint is kept.
        reference: Value that the next improvement is measured from; None before the first.
        num_worse: Number of evaluations since the last improvement.
        last_step: Step of the last evaluation.
    """

    metric: str | None = None
    mode: str | None = None
    patience: int | None = None
    min_delta: float = 0.0
    after: int = 0
    best: Best | None = None
    reference: float | None = None
    num_worse: int = 0
    last_step: int = 0

    @classmethod
    def restored(
        cls, section: TrainSection, lines: Iterable[Mapping[str, Any]], kept: Collection[int], after: int | None
    ) -> "BestWatch":
        """Return the watch of a run after the evaluations so far.

        Args:
            section: Training section of the config.
            lines: Lines of metrics.jsonl.
            kept: Steps that have a checkpoint.
            after: Step at which the run stopped early before; None if it never did.
        """
        stopping = section.early_stopping
        patience, min_delta = (None, 0.0) if stopping is None else (stopping.patience, stopping.min_delta)
        watch = cls(section.best_metric, section.best_mode, patience, min_delta, after or 0)
        for step, value in evaluation_metrics(lines).get(watch.metric or "", {}).items():
            if watch.observe(step, value) and step in kept:
                watch.keep(step, value)
        return watch

    def observe(self, step: int, value: float) -> bool:
        """Count an evaluation; return whether it is the best so far. The one before training does not count."""
        if step <= self.last_step:
            return False
        self.last_step = step
        if math.isfinite(value) and (self.reference is None or self._gain(value, self.reference) > self.min_delta):
            self.reference, self.num_worse = value, 0
        elif step > self.after:
            self.num_worse += 1
        return math.isfinite(value) and (self.best is None or self._gain(value, self.best.value) > 0)

    def keep(self, step: int, value: float) -> None:
        """Take an evaluation, whose checkpoint was saved, as the best."""
        assert self.metric is not None
        self.best = Best(self.metric, value, step)

    @property
    def is_exhausted(self) -> bool:
        """Whether the run should stop early."""
        return self.patience is not None and self.num_worse >= self.patience

    def _gain(self, value: float, other: float) -> float:
        assert self.metric is not None
        gain = abs(value - other)
        return gain if is_better(self.metric, self.mode, value, other) else -gain


def is_better(metric: str, mode: str | None, value: float, other: float) -> bool:
    """Return whether a value of a metric is better than another one.

    Args:
        metric: Name of the metric.
        mode: `min` or `max`; None for what is known of the metric.
        value: The value.
        other: The other one.
    """
    return value < other if (mode or mode_of(metric)) == "min" else value > other


def loss_metrics(sets: Iterable[str], loss: Loss) -> list[str]:
    """Return the names in metrics.jsonl of what an objective's loss reports of held-out sets."""
    return [f"{name}_{metric}" for name in sets for metric in ("loss", *loss.metric_names)]


def check_metric(section: TrainSection, names: Collection[str], unknown: Collection[str] = ()) -> None:
    """Check that the metric by which a config chooses the best checkpoint will be logged.

    Args:
        section: Training section of the config.
        names: Names of the metrics of its evaluations.
        unknown: Those of them that functions of the user compute.

    Raises:
        ConfigError: It will not, or it is not known whether it should rise or fall.
    """
    metric = section.best_metric
    key = "early_stopping.metric" if section.early_stopping is not None else "keep_best"
    if metric is not None and metric not in names:
        loss = f"{metric.removesuffix('_perplexity')}_loss"
        if loss != f"{metric}_loss" and loss in names:
            raise ConfigError(f"train.{key}: {metric} is not compared; use {loss}, which is its logarithm.")
        raise ConfigError(f"train.{key}: {metric} is not evaluated; the metrics are {', '.join(names) or 'none'}.")
    if metric is not None and section.best_mode is None and (metric in unknown or mode_of(metric) is None):
        raise ConfigError(
            f"train.best_mode: is null, and whether {metric} should fall or rise is not known; set it to min or max."
        )
