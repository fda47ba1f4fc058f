"""The labels of a config, of a run, or of a release: found in the training rows, and kept in a file."""

import json
from pathlib import Path

from qlora.checkpoint import RunDirectory
from qlora.config import RunConfig
from qlora.data import Labels, find_labels, labels_from_dict
from qlora.errors import CheckpointError
from qlora.files.atomic import write_text
from qlora.files.json_files import read_object
from qlora.model.from_config import training_sources

LABELS_FILE = "labels.json"


def labels_from_config(config: RunConfig, run: RunDirectory | None = None) -> Labels | None:
    """Return the labels that a config or run classifies texts by; None if it does not.

    Args:
        config: The config.
        run: The run, if it was started: its labels were written then, and its training rows may be gone.

    Raises:
        QLoRAError: There are no labels, or the training rows or the run's file can't be read.
    """
    if config.train.classify_by is None:
        return None
    if run is not None and run.labels.is_file():
        return read_labels(run.labels)[0]
    return find_labels(training_sources(config.data), config.train.classify_by, config.data.labels)


def write_labels(path: Path, labels: Labels, max_seq_len: int) -> None:
    """Write labels with their words, and the length that texts are truncated to; whole, or not at all."""
    write_text(path, json.dumps(labels.as_dict() | {"max_seq_len": max_seq_len}, indent=2, ensure_ascii=False) + "\n")


def read_labels(path: Path) -> tuple[Labels, int]:
    """Read a file of labels.

    Returns:
        The labels, and the length that texts are truncated to.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    remedy = "restore it, or merge again"
    values = read_object(path, CheckpointError, remedy)
    try:
        max_seq_len = values.get("max_seq_len")
        if not isinstance(max_seq_len, int) or max_seq_len < 1:
            raise ValueError("max_seq_len")
        return labels_from_dict(values), max_seq_len
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged; {remedy} ({error}).") from None
