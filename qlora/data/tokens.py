"""A document in tokens, with the weight of each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Name of the column with an image's pixels, (channels, height, width).
PIXELS = "pixels"


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One document in tokens; an image is one of a single token.

    Attributes:
        input_ids: (length,), int32.
        weights: (length,), float16: weight of the loss of predicting the token, 0 if it is not supervised. The first
            is always 0, as no token precedes it.
        values: What else is known about the document, by the columns of its store, such as whether it was rated good.
    """

    input_ids: np.ndarray
    weights: np.ndarray
    values: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_mask(self) -> np.ndarray:
        """(length,), bool: whether the token is supervised."""
        return self.weights > 0

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return int(np.count_nonzero(self.weights))

    @property
    def content(self) -> bytes:
        """What the document says: its tokens, and its pixels if it is an image."""
        pixels = self.values.get(PIXELS)
        return self.input_ids.tobytes() + (b"" if pixels is None else pixels.tobytes())

    @property
    def total_weight(self) -> float:
        """Sum of all weights: the number of supervised tokens if each has weight 1."""
        return float(self.weights.sum(dtype=np.float64))

    def __getitem__(self, span: slice) -> "TokenizedExample":
        """Return a part of the document as a document of its own."""
        return make_example(self.input_ids[span], self.weights[span], self.values)


def make_example(input_ids: Any, weights: Any, values: Mapping[str, Any] = {}) -> TokenizedExample:  # noqa: B006 (never changed)
    """Build an example from ids and weights, sequences of equal length; weights may also be a mask of booleans."""
    weights = np.array(weights, dtype=np.float16)
    weights[:1] = 0
    return TokenizedExample(np.asarray(input_ids, dtype=np.int32), weights, values)


def supervised_bytes(tokenizer: Any, examples: Iterable[TokenizedExample]) -> int:
    """Count the UTF-8 bytes that the supervised tokens of examples decode to, without special tokens."""
    texts = (tokenizer.decode(example.input_ids[example.loss_mask], skip_special_tokens=True) for example in examples)
    return sum(len(text.encode()) for text in texts)
