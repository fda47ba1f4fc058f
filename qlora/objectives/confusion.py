"""What a confusion matrix says of each label and of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ACCURACY, MACRO_F1 = "accuracy", "macro_f1"


@dataclass(frozen=True, slots=True)
class LabelResult:
    """How well one label is predicted.

    Attributes:
        texts: Number of texts with the label.
        predicted: Number of texts that are predicted to have it.
        correct: Number of texts that have it and are predicted to.
    """

    texts: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float:
        """Share of the predictions that are correct; 0 without any."""
        return self.correct / max(1, self.predicted)

    @property
    def recall(self) -> float:
        """Share of the texts that are found; 0 without any."""
        return self.correct / max(1, self.texts)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 if both are."""
        return 2 * self.correct / max(1, self.texts + self.predicted)

    def described(self, name: str) -> dict[str, Any]:
        """Return the label's name and numbers for reports."""
        numbers = {"precision": self.precision, "recall": self.recall, "f1": self.f1, "texts": self.texts}
        return {"label": name} | numbers


def count_labels(given: torch.Tensor, predicted: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Count texts by their label and the predicted one.

    Args:
        given: (texts,), int64, numbers of their labels; or (texts, labels), 1 for each label of several.
        predicted: Of the same shape.
        num_labels: Number of labels.

    Returns:
        (labels, labels), int64, by label and predicted label; for several labels (labels, 2, 2), by whether texts have
        each label and whether it is predicted.
    """
    shape: tuple[int, ...] = (num_labels, num_labels)
    places = given * num_labels + predicted
    if given.dim() == 2:
        shape = (num_labels, 2, 2)
        places = torch.arange(num_labels, device=given.device) * 4 + given * 2 + predicted
    places = places.flatten()
    # Not bincount, which makes the host wait for the device.
    counts = places.new_zeros(int(np.prod(shape)))
    return counts.index_add_(0, places, torch.ones_like(places)).view(shape)


def by_label(counts: Sequence[Any]) -> list[LabelResult]:
    """Return the result of each label, from what :func:`count_labels` counted."""
    if len(counts) == 0:  # of a loss without labels
        return []
    array = np.asarray(counts, dtype=np.int64)
    if array.ndim == 3:
        columns: Any = (array[:, 1].sum(axis=1), array[:, :, 1].sum(axis=1), array[:, 1, 1])
    else:
        columns = (array.sum(axis=1), array.sum(axis=0), array.diagonal())
    return [LabelResult(*map(int, numbers)) for numbers in zip(*columns, strict=True)]


def summarize(counts: Sequence[Any]) -> Mapping[str, float]:
    """Return the mean over labels of F1; labels that occur neither in texts nor in predictions are left out."""
    scores = [each.f1 for each in by_label(counts) if each.texts or each.predicted]
    return {MACRO_F1: float(np.mean(scores)) if scores else 0.0}
