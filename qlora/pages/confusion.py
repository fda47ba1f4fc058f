"""The confusion matrix of a run that classifies, as its page shows it."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora.checkpoint import RunDirectory
from qlora.data import labels_from_dict
from qlora.errors import CheckpointError
from qlora.files.json_files import read_object

# Labels up to which the page shows every pair of them.
MOST_LABELS = 40


def last_confusion(run: RunDirectory, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the counts of the last evaluation by label and predicted label; None for runs without any.

    Args:
        run: The run.
        lines: Lines of its metrics.jsonl.

    Raises:
        CheckpointError: The run's file of labels is damaged.
    """
    evaluated = [line for line in lines if "eval_confusion" in line]
    if not evaluated or not run.labels.is_file():
        return None
    try:
        labels = labels_from_dict(read_object(run.labels, CheckpointError, "restore it"))
    except ValueError as error:
        raise CheckpointError(f"{run.labels} is damaged; restore it ({error}).") from None
    if labels.is_multiple or len(labels.names) > MOST_LABELS:
        return None
    line = evaluated[-1]
    return {"step": line["step"], "labels": list(labels.names), "counts": line["eval_confusion"]}
