"""Documents into rows of a fixed length, with as little left empty as can be."""

from bisect import bisect_left, insort

import numpy as np


def pack_best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs documents by best fit decreasing: the longest first, each where it leaves the least room.

    Among equals the order of `lengths` decides, so that the same documents always give the same rows.

    Args:
        lengths: (documents,), int, in tokens, none longer than `capacity`.
        capacity: Tokens of a row.

    Returns:
        The documents of each row.
    """
    rows: list[list[int]] = []
    # Rows by the room they have left; how much room there is anywhere, sorted.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    sizes = np.asarray(lengths).tolist()
    for document in order:
        size = sizes[document]
        assert size <= capacity
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(document)
        left = room - size
        if left:
            if left not in by_room:
                insort(rooms, left)
                by_room[left] = []
            by_room[left].append(row)
    return rows
