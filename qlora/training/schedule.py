"""Learning rates and intervals as functions of the step, so that they need not be saved."""

import math
from collections.abc import Callable

from qlora.config import TrainSection


def learning_rate(
    step: int, total_steps: int, peak: float, kind: str, warmup_ratio: float, minimum: float = 0.0
) -> float:
    """Return the learning rate of a step.

    Args:
        step: Number of the step, from 0.
        total_steps: Number of steps of the run.
        peak: Rate at the end of the warm-up.
        kind: `cosine` and `linear` fall to the minimum at the end, `constant` stays at the peak.
        warmup_ratio: Share of the run over which the rate rises linearly from zero.
        minimum: Rate that the schedule falls to.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in ("cosine", "linear", "constant"):
        raise ValueError(f"kind {kind!r} should be cosine, linear or constant")
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    share = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * share


def rate_of(section: TrainSection, total_steps: int) -> Callable[[int], float]:
    """Return a config's learning rate as a function of the step."""
    return lambda step: learning_rate(
        step,
        total_steps,
        peak=section.learning_rate,
        kind=section.lr_scheduler,
        warmup_ratio=section.warmup_ratio,
        minimum=section.min_learning_rate,
    )


def resolve_interval(value: int | float | None, total_steps: int) -> int | None:
    """Return the steps between two events that a config gives in steps, as a share of the run, or as None for never."""
    if value is None:
        return None
    is_share = isinstance(value, float) and value <= 1
    return max(1, round(value * total_steps)) if is_share else int(value)


def resolve_total_steps(epochs: float, max_steps: int | None, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps of a run; `max_steps` overrides `epochs`."""
    return max_steps or max(1, math.ceil(epochs * steps_per_epoch))
