"""What a confusion matrix says of each label and of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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


def matrix_of(counts: Sequence[int]) -> np.ndarray:
    """Return counts by label and predicted label as a matrix, (labels, labels), int64."""
    size = round(len(counts) ** 0.5)
    return np.reshape(np.asarray(counts, dtype=np.int64), (size, size))


def by_label(confusion: np.ndarray) -> list[LabelResult]:
    """Return the result of each label.

    Args:
        confusion: (labels, labels), number of texts by their label and the predicted one.
    """
    columns: Any = zip(confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal(), strict=True)
    return [LabelResult(*map(int, numbers)) for numbers in columns]


def macro_f1(confusion: np.ndarray) -> float:
    """Return the mean over labels of F1; labels that occur neither in texts nor in predictions are left out."""
    scores = [each.f1 for each in by_label(confusion) if each.texts or each.predicted]
    return float(np.mean(scores)) if scores else 0.0
