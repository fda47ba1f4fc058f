"""Documents into rows of a fixed length, with as little left empty as can be."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Documents looked at together: numbers of numpy are slow one by one, and all of them as Python's take much memory.
BLOCK = 1 << 16


class Rows(Sequence[list[int]]):
    """Which documents each row holds, in a few bytes per document.

    Args:
        documents: (documents,), int64, row after row.
        starts: (rows + 1,), int64: where each row begins in `documents`, and the end.
    """

    def __init__(self, documents: np.ndarray, starts: np.ndarray) -> None:
        self._documents, self._starts = documents, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def num_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """(rows,), of each, given those of every document."""
        return np.add.reduceat(lengths[self._documents], self._starts[:-1])

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._documents[self._starts[row] : self._starts[row + 1]].tolist()


def one_per_row(documents: np.ndarray) -> Rows:
    """Each document as a row of its own, in the order given."""
    return Rows(documents, np.arange(len(documents) + 1))


def pack_best_fit(lengths: np.ndarray, capacity: int) -> Rows:
    """Packs documents by best fit decreasing: the longest first, each where it leaves the least room.

    Among equals the order of `lengths` decides, so that the same documents always give the same rows.

    Args:
        lengths: (documents,), int, in tokens, none longer than `capacity`.
        capacity: Tokens of a row.

    Returns:
        The documents of each row.
    """
    assert not len(lengths) or int(lengths.max()) <= capacity
    row_of = np.empty(len(lengths), dtype=np.int64)
    num_rows = 0
    # Rows by the room they have left; how much room there is anywhere, sorted.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for document, size in _longest_first(lengths):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room = num_rows, capacity
            num_rows += 1
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        row_of[document] = row
        left = room - size
        if left:
            if left not in by_room:
                insort(rooms, left)
                by_room[left] = []
            by_room[left].append(row)
    counts = np.bincount(row_of, minlength=num_rows)
    return Rows(np.argsort(row_of, kind="stable"), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _longest_first(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        yield from zip(block.tolist(), lengths[block].tolist(), strict=True)
