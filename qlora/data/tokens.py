"""A document in tokens, and how much each of them counts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One document.

    Attributes:
        input_ids: (length,), int32.
        weights: (length,), float16: how much the loss of predicting the token counts; 0 where it is not learned. The
            first never is: nothing comes before it.
    """

    input_ids: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_mask(self) -> np.ndarray:
        """(length,), bool: the token is to be predicted."""
        return self.weights > 0

    @property
    def num_supervised(self) -> int:
        """Tokens that are to be predicted."""
        return int(np.count_nonzero(self.weights))

    @property
    def total_weight(self) -> float:
        """Of all tokens; their number where each counts as one."""
        return float(self.weights.sum(dtype=np.float64))

    def __getitem__(self, span: slice) -> "TokenizedExample":
        """A part of the document, as a document of its own."""
        return make_example(self.input_ids[span], self.weights[span])


def make_example(input_ids: Any, weights: Any) -> TokenizedExample:
    """Builds an example from ids and their weights, any sequences of equal length; a mask of truths serves too."""
    weights = np.array(weights, dtype=np.float16)
    weights[:1] = 0
    return TokenizedExample(np.asarray(input_ids, dtype=np.int32), weights)


def supervised_bytes(tokenizer: Any, examples: Iterable[TokenizedExample]) -> int:
    """Bytes of UTF-8 that the supervised tokens of examples stand for, special tokens left out."""
    texts = (tokenizer.decode(example.input_ids[example.loss_mask], skip_special_tokens=True) for example in examples)
    return sum(len(text.encode()) for text in texts)
