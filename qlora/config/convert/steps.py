"""Translation of keys that depend on the number of steps: the schedule, and intervals of evaluation and saving."""

from qlora.config.convert import values
from qlora.config.convert.draft import OFF, Draft


def translate_steps(draft: Draft) -> None:
    """Translate schedule and intervals; epochs and learning rate are in the draft already."""
    ratio = values.number(draft.take("warmup_ratio"))
    if ratio is not None:
        draft.set("train.warmup_ratio", ratio, "warmup_ratio")
    steps = values.number(draft.take("max_steps"))
    if steps is not None and steps > 0:
        draft.set("train.max_steps", steps, "max_steps")
    _schedule(draft)
    _intervals(draft)


def _schedule(draft: Draft) -> None:
    key, name = draft.take_named("lr_scheduler", "lr_scheduler_type")
    if name not in OFF:
        found = values.schedule(name)
        ours, difference = found or ("cosine", f"{name} is not available")
        draft.set("train.lr_scheduler", ours, f"{key}: {name}{', see above' if difference else ''}")
        if difference:
            draft.warn(f"The schedule {name} becomes {ours}: {difference}.")
    peak = values.number(draft.values.get("train.learning_rate"))
    options = values.mapping(draft.take("lr_scheduler_kwargs"))
    ratio = values.number(draft.take("cosine_min_lr_ratio")) or values.number(options.get("min_lr_rate"))
    floor = values.number(draft.take("min_lr")) or values.number(options.get("min_lr"))
    if floor is None and ratio is not None and peak is not None:
        floor = float(f"{ratio * peak:.6g}")
    if floor is not None:
        draft.set("train.min_learning_rate", floor, "the schedule's lowest rate")
    if name == "constant":
        draft.values.pop("train.warmup_ratio", None)
        draft.set("train.warmup_ratio", 0.0, "a constant schedule has no warmup there")
        draft.take("warmup_steps")
        return
    steps = values.number(draft.take("warmup_steps"))
    if steps is None or "train.warmup_ratio" in draft.values and not steps:
        return
    draft.values.pop("train.warmup_ratio", None)
    most = draft.values.get("train.max_steps")
    if steps < 1:
        draft.set("train.warmup_ratio", float(steps), "warmup_steps")
    elif most is not None:
        draft.set("train.warmup_ratio", min(0.99, round(steps / most, 6)), f"warmup_steps: {steps} of {most}")
    else:
        draft.set("train.warmup_ratio", 0.03, f"warmup_steps: {steps}, see above")
        draft.warn(
            f"warmup_steps: {steps} is a number of steps; train.warmup_ratio is a share of the run. Divide by the "
            "steps that qlora preview prints; 0.03 is set."
        )


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
