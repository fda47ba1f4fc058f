"""Best fit decreasing that tries every sequence for every document."""


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return the documents of each sequence."""
    rows: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        best, least = None, capacity + 1
        for row in rows:
            left = capacity - sum(lengths[index] for index in row) - lengths[document]
            if 0 <= left < least:
                best, least = row, left
        if best is None:
            rows.append([document])
        else:
            best.append(document)
    return rows
