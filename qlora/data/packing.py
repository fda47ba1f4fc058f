"""Rows of a fixed length packed from documents by best fit."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Number of documents converted to Python's numbers at a time: one by one is slow, and all together take much memory.
BLOCK = 1 << 16


class Rows(Sequence[list[int]]):
    """The documents of each row, in a few bytes per document.

    Args:
        documents: (documents,), int64, row after row.
        starts: (rows + 1,), int64: where each row begins in `documents`, and the end.
    """

    def __init__(self, documents: np.ndarray, starts: np.ndarray) -> None:
        self._documents, self._starts = documents, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def num_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each row, (rows,), given those of every document."""
        return np.add.reduceat(lengths[self._documents], self._starts[:-1])

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._documents[self._starts[row] : self._starts[row + 1]].tolist()

    def with_groups_of(self, size: int) -> "Rows":
        """Replace each document, taken as the number of a group, by the group's consecutive documents."""
        documents = self._documents[:, None] * size + np.arange(size)
        return Rows(documents.reshape(-1), self._starts * size)


def pack_groups(
    lengths: np.ndarray, group_size: int = 1, capacity: int | None = None, longest_first: bool = False
) -> Rows:
    """Put groups of consecutive documents into rows; a group is never parted.

    Args:
        lengths: (documents,), int, in tokens.
        group_size: Number of documents per group.
        capacity: Tokens of a row for each document of a group; None gives each group a row of its own.
        longest_first: Sort rows of one group by length instead of keeping their order.
    """
    totals = lengths.reshape(-1, group_size).sum(axis=1)
    if capacity is not None:
        rows = pack_best_fit(totals, capacity * group_size)
    else:
        rows = _one_per_row(np.argsort(-totals, kind="stable") if longest_first else np.arange(len(totals)))
    return rows.with_groups_of(group_size)


def _one_per_row(documents: np.ndarray) -> Rows:
    return Rows(documents, np.arange(len(documents) + 1))


def pack_best_fit(lengths: np.ndarray, capacity: int) -> Rows:
    """Pack documents by best fit decreasing: the longest first, each into the row where it leaves the least room.

    Among equals the order of `lengths` decides, so the same documents always give the same rows.

    Args:
        lengths: (documents,), int, in tokens, none longer than `capacity`.
        capacity: Tokens of a row.

    Returns:
        The documents of each row.
    """
    assert not len(lengths) or int(lengths.max()) <= capacity
    row_of = np.empty(len(lengths), dtype=np.int64)
    num_rows = 0
    # Rows by their free room, and all values of free room, sorted.
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
