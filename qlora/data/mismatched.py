"""Rated answers with the prompts of other rows, from which KTO estimates how far a model is from its reference."""

from collections.abc import Iterator, Sequence

import numpy as np

from qlora.data.tokens import TokenizedExample, make_example
from qlora.errors import DataError

RATING = "rating"
# What the column `rating` holds; a mismatched answer has none.
GOOD, BAD, MISMATCHED = 1, -1, 0


class MismatchedAnswers:
    """Add to each rated document one with the same prompt and the answer to another prompt.

    That is the nearest answer before it to another prompt; for the first rows, the nearest after them. So the pairs
    follow from the order of the rows alone, not from how they are batched later (KTO, arXiv:2402.01306, takes them from
    the batch).

    Args:
        max_seq_len: Maximum length of a document in tokens; longer answers are truncated.
    """

    def __init__(self, max_seq_len: int) -> None:
        self._max_seq_len = max_seq_len
        # The last document, and the last one before it with another prompt.
        self._last: TokenizedExample | None = None
        self._other: TokenizedExample | None = None
        self._waiting: list[tuple[int, TokenizedExample]] = []

    def add(self, row: int, document: TokenizedExample) -> Iterator[tuple[int, Sequence[TokenizedExample]]]:
        """Yield the rows and groups that are complete with a rated document: itself, and the mismatched one."""
        if self._last is not None and not np.array_equal(_prompt(self._last), _prompt(document)):
            self._other = self._last
            for earlier_row, earlier in self._waiting:
                yield earlier_row, (earlier, self._mismatch(earlier, document))
            self._waiting = []
        self._last = document
        if self._other is None:
            self._waiting.append((row, document))
        else:
            yield row, (document, self._mismatch(document, self._other))

    def close(self) -> None:
        """Check that every document got a mismatched one.

        Raises:
            DataError: All documents have the same prompt.
        """
        if self._waiting:
            raise DataError(
                "kto rows are compared with answers to other prompts, but all rows have the same prompt; add rows with "
                "another one."
            )

    def _mismatch(self, document: TokenizedExample, other: TokenizedExample) -> TokenizedExample:
        own, start = len(_prompt(document)), len(_prompt(other))
        parts = [(document.input_ids[:own], document.weights[:own]), (other.input_ids[start:], other.weights[start:])]
        ids, weights = (np.concatenate(each)[: self._max_seq_len] for each in zip(*parts, strict=True))
        return make_example(ids, weights, {RATING: np.int8(MISMATCHED)})


def _prompt(document: TokenizedExample) -> np.ndarray:
    """Return the ids before the answer, (length,)."""
    return document.input_ids[: int(np.flatnonzero(document.weights)[0])]
