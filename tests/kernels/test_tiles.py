"""Sizes of tiles, which no test of a kernel shows: a tile that is too large is masked."""

import pytest

from qlora.kernels.tiles import num_tiles, power_of_2, row_tile


@pytest.mark.parametrize(
    ("number", "power"), [(1, 1), (2, 2), (3, 4), (4, 4), (15, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192)]
)
def test_powers_of_2_are_the_smallest(number, power):
    assert power_of_2(number) == power


@pytest.mark.parametrize(("length", "number"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_tiles_cover_a_length(length, number):
    assert num_tiles(length, 16) == number


@pytest.mark.parametrize(
    ("width", "tile"), [(1, (64, 16)), (16, (64, 16)), (17, (32, 32)), (1024, (1, 1024)), (1025, (1, 2048))]
)
def test_a_tile_has_whole_rows_and_as_many_as_fit(width, tile):
    assert row_tile(width, values=1024) == tile
