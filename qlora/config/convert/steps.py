"""Translation of keys that depend on the number of steps: the schedule, and intervals of evaluation and saving."""

from typing import Any

from qlora.config.convert import values
from qlora.config.convert.draft import OFF, Draft


def translate_steps(draft: Draft) -> None:
    """Translate schedule and intervals; epochs and learning rate are in the draft already."""
    steps = values.number(draft.take("max_steps"))
    if steps is not None and steps > 0:
        draft.set("train.max_steps", steps, "max_steps")
    _schedule(draft)
    _intervals(draft)


def _schedule(draft: Draft) -> None:
    key, name = draft.take_named("lr_scheduler", "lr_scheduler_type")
    options = values.mapping(draft.take("lr_scheduler_kwargs"))
    if name not in OFF:
        found = values.schedule(name)
        ours, difference = found or ("cosine", f"{name} is not available")
        cycles = values.number(options.get("num_cycles")) or values.number(draft.take("num_cycles")) or 1
        if ours == "cosine_restarts" and cycles < 2:
            ours = "cosine"  # a single cycle has no restart
        draft.set("train.lr_scheduler", ours, f"{key}: {name}{', see above' if difference else ''}")
        if ours == "cosine_restarts":
            draft.set("train.restarts", round(cycles) - 1, f"num_cycles: {cycles:g}")
        if ours == "wsd":
            _decay(draft, options)
        if difference:
            draft.warn(f"The schedule {name} becomes {ours}: {difference}.")
    _floor(draft, options)
    _warmup(draft, has_none=name == "constant")


def _decay(draft: Draft, options: dict[Any, Any]) -> None:
    """Translate how a stable schedule falls in the end."""
    steps, most = values.number(options.get("num_decay_steps")), draft.values.get("train.max_steps")
    if steps and most and 0 < steps < most:
        draft.set("train.decay_ratio", round(steps / most, 6), f"num_decay_steps: {steps} of {most}")
    else:
        draft.warn("The rate falls over the last train.decay_ratio of the run, which is 0.2.")
    if options.get("decay_type") != "1-sqrt":
        draft.warn("decay_type is ignored: the rate decays as 1 - sqrt(progress).")


def _floor(draft: Draft, options: dict[Any, Any]) -> None:
    peak = values.number(draft.values.get("train.learning_rate"))
    ratios = (draft.take("cosine_min_lr_ratio"), options.get("min_lr_rate"), options.get("min_lr_ratio"))
    ratio = next(filter(None, map(values.number, ratios)), None)
    floor = values.number(draft.take("min_lr")) or values.number(options.get("min_lr"))
    if floor is None and ratio is not None and peak is not None:
        floor = float(f"{ratio * peak:.6g}")
    if floor is not None:
        draft.set("train.min_learning_rate", floor, "the schedule's lowest rate")


def _warmup(draft: Draft, has_none: bool) -> None:
    """Translate the warmup; a number of steps is preferred to a share, as in transformers."""
    ratio, steps = values.number(draft.take("warmup_ratio")), values.number(draft.take("warmup_steps"))
    if has_none:
        draft.set("train.warmup_ratio", 0.0, "a constant schedule has no warmup there")
    elif steps is not None and steps >= 1:
        draft.set("train.warmup_steps", round(steps), "warmup_steps")
    elif steps:
        draft.set("train.warmup_ratio", float(steps), "warmup_steps")
    elif ratio is not None:
        draft.set("train.warmup_ratio", ratio, "warmup_ratio")
    elif steps is not None:
        draft.set("train.warmup_steps", 0, "warmup_steps")
    elif draft.trainer != "axolotl":  # its default is a share of 0.03, as here
        draft.set("train.warmup_ratio", 0.0, f"{draft.trainer}'s default")


def _intervals(draft: Draft) -> None:
    for key, singular, plural, strategies in (
        ("train.eval_every", "eval_steps", "evals_per_epoch", ("eval_strategy", "evaluation_strategy")),
        ("train.save_every", "save_steps", "saves_per_epoch", ("save_strategy",)),
    ):
        steps, per_epoch = values.number(draft.take(singular)), values.number(draft.take(plural))
        name, strategy = draft.take_named(*strategies)
        if strategy in ("no", False):
            draft.set(key, None, f"{name}: no")
        elif per_epoch or strategy == "epoch":
            draft.set(key, _share(draft, per_epoch or 1), f"{per_epoch or 1} in an epoch")
        elif steps is not None:
            draft.set(key, steps or None, singular)
        elif per_epoch == 0:
            draft.set(key, None, plural)
        elif strategy == "best":
            draft.warn(f"{name}: best is not available; checkpoints are saved by steps.")


def _share(draft: Draft, per_epoch: int | float) -> float:
    """Return the share of a run between two events, so many in each epoch."""
    epochs = max(draft.values.get("train.epochs", 1), 0.01)
    if "train.max_steps" in draft.values:
        draft.warn("The run ends by train.max_steps, so intervals by epoch are set as shares of the whole run.")
        epochs = 1
    return float(min(1.0, round(1 / (per_epoch * epochs), 6)))
