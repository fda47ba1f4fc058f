"""Curves of a run: its logged numbers by quantity, smoothed, and thinned without losing extremes."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from qlora.checkpoint import evaluation_metrics

# Share of the logged steps that the smoothed training loss averages over.
SMOOTHED_SHARE = 0.05
# Source of the numbers of training steps; other sources are the names of evaluation sets.
TRAINING = "train"
# Quantities of training steps in the order of their charts, with titles; those of the objective come after the loss.
TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_second": "Tokens per second",
    "peak_memory": "Peak memory",
    "mean_rank": "Mean rank of the adapters",
    "zero_update_share": "Share of updates lost to rounding",
}
# Quantities that don't vary from step to step by chance.
STEADY = {"learning_rate", "peak_memory", "mean_rank"}
# Numbers of a line that no chart shows.
NOT_DRAWN = {"step", "epoch", "tokens", "supervised_tokens", "dead_adapters"}
DIGITS = 7
Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity over the steps.

    Attributes:
        source: `train`, or the name of an evaluation set.
        points: Steps, ascending, and values.
        is_smoothed: Whether it is the moving average of another curve.
    """

    source: str
    points: Points
    is_smoothed: bool = False


def curves_by_quantity(lines: Sequence[Mapping[str, Any]], sets: Collection[str]) -> dict[str, list[Curve]]:
    """Return the curves of each quantity, those of training first, in the order of their charts.

    Args:
        lines: Lines of metrics.jsonl.
        sets: Names of the evaluation sets.
    """
    training: dict[str, dict[int, float]] = {}
    for line in lines:
        if is_number(line.get("loss")):
            for name in line:
                if name not in NOT_DRAWN and is_number(line[name]):
                    training.setdefault(name, {})[line["step"]] = line[name]
    found: dict[str, list[Curve]] = {}
    for name, by_step in training.items():
        points = sorted(by_step.items())
        found[name] = [Curve(TRAINING, points)]
        if name not in STEADY and SMOOTHED_SHARE * len(points) > 1:  # of fewer points, each is its own average
            found[name].append(Curve(TRAINING, smoothed(points), is_smoothed=True))
    for key, values in evaluation_metrics(lines).items():
        source, metric = _split(key, sets)
        points = sorted((step, value) for step, value in values.items() if is_number(value))
        if points:
            found.setdefault(metric, []).append(Curve(source, points))
    first, *others = TITLES
    metrics = [name for name in found if name not in TITLES]
    return {name: found[name] for name in [first, *metrics, *others] if name in found}


def title_of(quantity: str) -> str:
    """Return the title of a quantity's chart."""
    return TITLES.get(quantity) or quantity.replace("_", " ").capitalize()


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def smoothed(points: Points) -> Points:
    """Return an exponential moving average, corrected for its start at zero."""
    decay = 1 - 1 / max(1.0, SMOOTHED_SHARE * len(points))
    averages, total, weight = [], 0.0, 0.0
    for step, value in points:
        total, weight = decay * total + value, decay * weight + 1
        averages.append((step, total / weight))
    return averages


def thinned(points: Points, limit: int) -> Points:
    """Return at most about `limit` of the points: the first, the last, and the extremes of equal parts between them.

    Args:
        points: Steps, ascending, and values.
        limit: Number of points up to which all are returned; at least 4.
    """
    if len(points) <= limit:
        return points
    parts, inner = (limit - 2) // 2, points[1:-1]
    kept = [points[0]]
    for part in range(parts):
        bucket = inner[part * len(inner) // parts : (part + 1) * len(inner) // parts]
        extremes = {min(bucket, key=_value), max(bucket, key=_value)}
        kept += sorted(extremes)
    return [*kept, points[-1]]


def as_columns(points: Iterable[tuple[int, float]]) -> dict[str, list[float]]:
    """Return points as a list of steps and one of values, rounded to seven digits."""
    pairs = list(points)
    return {"steps": [step for step, _ in pairs], "values": [float(f"{value:.{DIGITS}g}") for _, value in pairs]}


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _split(key: str, sets: Collection[str]) -> tuple[str, str]:
    """Return the set and the metric of an evaluated value's name."""
    candidates = [name for name in {*sets, "eval", "retain"} if key.startswith(f"{name}_")]
    source = max(candidates, key=len)
    return source, key.removeprefix(f"{source}_")
