"""Rated answers with the prompts of other rows, from which KTO estimates how far a model is from its reference."""

from collections.abc import Iterator, Sequence

import numpy as np

from qlora.data.tokens import TokenizedExample, make_example
from qlora.errors import DataError

RATING = "rating"
# What the column `rating` holds; a mismatched answer has none.
GOOD, BAD, MISMATCHED = 1, -1, 0


class MismatchedAnswers:
    """Add to each rated document one with the same prompt and the answer of another row.

    That is the answer of the row before; for the first one, that of the second. So the pairs follow from the order of
    the rows alone, not from how they are batched later (KTO, arXiv:2402.01306, takes them from the batch).

    Args:
        max_seq_len: Maximum length of a document in tokens; longer answers are truncated.
    """

    def __init__(self, max_seq_len: int) -> None:
        self._max_seq_len = max_seq_len
        self._previous: tuple[int, TokenizedExample] | None = None
        self._first: tuple[int, TokenizedExample] | None = None

    def add(self, row: int, document: TokenizedExample) -> Iterator[tuple[int, Sequence[TokenizedExample]]]:
        """Yield the rows and groups that are complete with a rated document: itself, and the mismatched one."""
        if self._previous is None:
            self._first = row, document
        else:
            if self._first is not None:
                first_row, first = self._first
                yield first_row, (first, self._mismatch(first, document))
                self._first = None
            yield row, (document, self._mismatch(document, self._previous[1]))
        self._previous = row, document

    def close(self) -> None:
        """Check that the first document got a mismatched one.

        Raises:
            DataError: There is a single document.
        """
        if self._first is not None:
            raise DataError(
                "kto rows are compared with the answers of other rows, but there is a single one; add rows."
            )

    def _mismatch(self, document: TokenizedExample, other: TokenizedExample) -> TokenizedExample:
        (begin, *_), (other_begin, *_) = (np.flatnonzero(each.weights) for each in (document, other))
        parts = [(document.input_ids[:begin], document.weights[:begin])]
        parts.append((other.input_ids[other_begin:], other.weights[other_begin:]))
        ids, weights = (np.concatenate(each)[: self._max_seq_len] for each in zip(*parts, strict=True))
        return make_example(ids, weights, {RATING: np.int8(MISMATCHED)})
