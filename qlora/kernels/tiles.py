"""Sizes and numbers of tiles that kernels are launched with.

Triton's own functions for them take 3 µs a call, which adds up over the launches of a layer.
"""

# Columns of the narrowest tile of whole rows.
LEAST_COLUMNS = 16


def num_tiles(length: int, size: int) -> int:
    """Return the number of tiles of a size that cover a length."""
    return -(-length // size)


def power_of_2(least: int) -> int:
    """Return the smallest power of 2 that is not below a positive number."""
    return 1 << (least - 1).bit_length()


def row_tile(width: int, values: int) -> tuple[int, int]:
    """Return the rows and columns of a tile of whole rows, powers of 2.

    Args:
        width: Number of values of a row.
        values: Number of values of the tile, a power of 2; a tile of a single row may have more.
    """
    columns = max(LEAST_COLUMNS, power_of_2(width))
    return max(1, values // columns), columns
