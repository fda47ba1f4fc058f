"""Metrics of evaluations, as lines of metrics.jsonl hold them."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

# A metric's name begins with its set: `eval_loss`, `eval_NAME_loss`, `retain_loss`.
SETS = ("eval_", "retain_")
# These follow from the losses and the data, and have a loss of the same set beside them.
NOT_COMPARED = ("_perplexity", "_supervised_tokens")
# The names of metrics end with one of these: they should fall, or rise.
FALLING = ("loss", "kl", "reward_rejected", "log_prob_rejected")
RISING = (
    "accuracy", "macro_f1", "exact_match", "contains", "f1", "chrf", "bleu",
    "reward_accuracy", "reward_margin", "reward_chosen", "log_prob_chosen", "log_prob",
)  # fmt: skip


def is_evaluated(name: str, beside: Collection[str] = ()) -> bool:
    """Return whether a key of metrics.jsonl is a metric of an evaluation, which others are compared by.

    Args:
        name: The key.
        beside: Keys of the same line.
    """
    return name.startswith(SETS) and not any(
        name.endswith(end) and f"{name.removesuffix(end)}_loss" in beside for end in NOT_COMPARED
    )


def evaluation_metrics(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return each metric of the evaluations, by its name and by step.

    Args:
        lines: Lines of metrics.jsonl.
    """
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name in (each for each in line if is_evaluated(each, line.keys()) and isinstance(line[each], int | float)):
            found.setdefault(name, {})[line["step"]] = line[name]
    return found


def metric_label(name: str) -> str:
    """Return a metric's name for people."""
    if name == "eval_loss":
        return "held-out loss"
    if name.startswith("retain_"):
        return name.replace("retain_", "retained ", 1).replace("_", " ")
    return name.removeprefix("eval_").replace("_", " ")


def mode_of(name: str) -> str | None:
    """Return whether a metric is best at its smallest value, `min`, or at its largest, `max`; None if it is not known.

    Args:
        name: Name of the metric, with its set.
    """
    modes = {f"_{end}": mode for ends, mode in ((FALLING, "min"), (RISING, "max")) for end in ends}
    return next((mode for end, mode in modes.items() if name.endswith(end)), None)
