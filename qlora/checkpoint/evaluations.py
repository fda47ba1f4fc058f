"""Metrics of evaluations, as lines of metrics.jsonl hold them."""

from collections.abc import Iterable, Mapping
from typing import Any

# A metric's name begins with its set: `eval_loss`, `eval_NAME_loss`, `retain_loss`.
SETS = ("eval_", "retain_")
# These follow from the losses and the data.
NOT_COMPARED = ("_perplexity", "_supervised_tokens")


def is_evaluated(name: str) -> bool:
    """Return whether a key of metrics.jsonl is a metric of an evaluation, which others are compared by."""
    return name.startswith(SETS) and not name.endswith(NOT_COMPARED)


def evaluation_metrics(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return each metric of the evaluations, by its name and by step.

    Args:
        lines: Lines of metrics.jsonl.
    """
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name in (each for each in line if is_evaluated(each) and isinstance(line[each], int | float)):
            found.setdefault(name, {})[line["step"]] = line[name]
    return found


def metric_label(name: str) -> str:
    """Return a metric's name for people."""
    if name == "eval_loss":
        return "held-out loss"
    if name.startswith("retain_"):
        return name.replace("retain_", "retained ", 1).replace("_", " ")
    return name.removeprefix("eval_").replace("_", " ")


def is_lower_better(name: str) -> bool:
    """Return whether a smaller value of a metric is the better one: losses and divergences fall, scores rise."""
    return name.endswith(("loss", "perplexity", "_kl"))
