"""Learning rates and intervals as functions of the step, so that they need not be saved."""

import math
from collections.abc import Callable

from qlora.config import TrainSection

KINDS = ("cosine", "linear", "constant", "wsd", "inverse_sqrt", "cosine_restarts")
# Warmup steps that inverse_sqrt falls by if there are none, as in transformers.
INVERSE_SQRT_TIMESCALE = 10_000


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    kind: str,
    warmup_steps: int,
    minimum: float = 0.0,
    decay_ratio: float = 0.2,
    restarts: int = 1,
) -> float:
    """Return the learning rate of a step.

    Let p be the share of the steps after the warmup that are done. From the peak towards the minimum:

    - `cosine` falls by (1 + cos πp) / 2, `linear` by 1 - p, and `constant` stays at the peak.
    - `wsd` (warmup-stable-decay) stays at the peak, and falls by 1 - √q over the last `decay_ratio` of the run, where q
      is the share of these steps that is done (arXiv:2405.18392).
    - `inverse_sqrt` falls by √(w / (w + t)), t steps after w steps of warmup. It does not reach the minimum.
    - `cosine_restarts` falls by a cosine `restarts` + 1 times, each time from the peak (arXiv:1608.03983).

    Args:
        step: Number of the step, from 0.
        total_steps: Number of steps of the run.
        peak: Rate at the end of the warmup.
        kind: One of `KINDS`.
        warmup_steps: Number of steps over which the rate rises linearly from zero.
        minimum: Rate that the schedule falls to.
        decay_ratio: Share of the run in which `wsd` falls.
        restarts: Number of times that `cosine_restarts` returns to the peak.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} should be one of {', '.join(KINDS)}")
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    share = 1.0
    if kind == "cosine":
        share = _cosine(progress)
    elif kind == "linear":
        share = 1 - progress
    elif kind == "wsd":
        decay_steps = min(max(1, round(decay_ratio * total_steps)), total_steps - warmup_steps)
        share = 1 - math.sqrt(max(0.0, step - total_steps + decay_steps) / max(1, decay_steps))
    elif kind == "inverse_sqrt":
        timescale = warmup_steps or INVERSE_SQRT_TIMESCALE
        share = math.sqrt(timescale / (timescale + step - warmup_steps))
    elif kind == "cosine_restarts":
        share = _cosine((restarts + 1) * progress % 1) if progress < 1 else 0.0
    return minimum + (peak - minimum) * share


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def rate_of(section: TrainSection, total_steps: int) -> Callable[[int], float]:
    """Return a config's learning rate, which is a number, as a function of the step."""
    shape = {key: value for key in ("decay_ratio", "restarts") if (value := getattr(section, key)) is not None}
    warmup_steps = resolve_warmup(section, total_steps)
    return lambda step: learning_rate(
        step,
        total_steps,
        peak=section.peak,
        kind=section.lr_scheduler,
        warmup_steps=warmup_steps,
        minimum=section.min_learning_rate,
        **shape,
    )


def resolve_warmup(section: TrainSection, total_steps: int) -> int:
    """Return the number of warmup steps that a config gives as a number, or as a share of the run."""
    if section.warmup_steps is not None:
        return section.warmup_steps
    return math.ceil((section.warmup_ratio or 0.0) * total_steps)


def resolve_interval(value: int | float | None, total_steps: int) -> int | None:
    """Return the steps between two events that a config gives in steps, as a share of the run, or as None for never."""
    if value is None:
        return None
    is_share = isinstance(value, float) and value <= 1
    return max(1, round(value * total_steps)) if is_share else int(value)


def resolve_total_steps(epochs: float, max_steps: int | None, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps of a run; `max_steps` overrides `epochs`."""
    return max_steps or max(1, math.ceil(epochs * steps_per_epoch))
