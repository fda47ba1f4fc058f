"""Weights of texts by their labels: what a loss and an accuracy are summed and divided by."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qlora.data import LABEL, Batch, TokenizedExample, to_device


@dataclass(frozen=True, slots=True)
class LabelWeights:
    """Weight of each label's texts.

    Attributes:
        values: A weight for each label, by its number; None weighs all texts the same.
    """

    values: Sequence[float] | None = None

    def units(self, part: TokenizedExample | Batch) -> float:
        """Return the weight of an example or of a batch that is on the CPU: the number of its texts without weights."""
        if self.values is None:
            return len(part.lengths) if isinstance(part, Batch) else 1
        return float(np.asarray(self.values)[np.asarray(part.values[LABEL])].sum())

    def by_label(self, device: torch.device) -> torch.Tensor | None:
        """Return the weight of each label, (labels,), fp32; None if all texts weigh the same."""
        return None if self.values is None else to_device(torch.tensor(self.values, dtype=torch.float32), device)

    def of_texts(self, numbers: torch.Tensor) -> torch.Tensor | None:
        """Return the weight of each text, (texts,), fp32; None if all weigh the same.

        Args:
            numbers: (texts,), int64: numbers of their labels.
        """
        weights = self.by_label(numbers.device)
        return None if weights is None else weights[numbers]

    def sum_correct(self, predicted: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return the weight of the texts whose label is predicted, a scalar, fp32.

        Args:
            predicted: (texts,), int64: numbers of the predicted labels.
            numbers: Those of their own labels.
        """
        correct, weights = (predicted == numbers).float(), self.of_texts(numbers)
        return correct.sum() if weights is None else correct @ weights
