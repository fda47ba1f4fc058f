"""Quantization to 4-bit codes on a CPU, by a lookup table instead of a search for nearly all values."""

import math
from functools import lru_cache

import torch

# Cells of [-1, 1]; so narrow that one value in two thousand is in a cell with a boundary between codes.
CELLS = 1 << 15
# In place of the code of such a cell, and of eight of them.
UNDECIDED = 16
ANY_UNDECIDED = 0x1010101010101010
# Values at a time for each thread, so that temporary tensors stay in its cache.
CHUNK = 1 << 17
# Smallest absmax to divide by, as in bitsandbytes.
LEAST = 1e-38


def quantize_4bit_cpu(weight: torch.Tensor, code: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale blocks of a weight by their largest magnitude, and take the nearest code of each value.

    Bit-equal to bitsandbytes 0.50 on a CPU, whose search takes several times as long. A value halfway between two codes
    gets the lower one, NaN the highest.

    Args:
        weight: On a CPU, in fp32, bf16 or fp16; its size is a multiple of `block_size`.
        code: (16,) fp32, ascending from -1 to 1.
        block_size: Values that share an absmax, a power of two from 8 to 4096.

    Returns:
        The codes, (numel / 2, 1) uint8, the first of each pair in the upper half; and the absmax, (blocks,) fp32.
    """
    boundaries, code_of_cell = _tables(tuple(code.tolist()))
    values = weight.reshape(-1)
    packed = torch.empty(len(values) // 2, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(len(values) // block_size, dtype=torch.float32, device="cpu")
    chunk = CHUNK * torch.get_num_threads()
    for start in range(0, len(values), chunk):
        blocks = values[start : start + chunk].float().view(-1, block_size)
        largest = absmax[start // block_size :][: len(blocks)]
        torch.amax(blocks.abs(), dim=1, out=largest)
        scaled = blocks * (1 / largest.clamp(min=LEAST)).view(-1, 1)
        if not math.isfinite(largest.max()):
            scaled = scaled.clamp_(-1, 1).nan_to_num_(1)
        codes = code_of_cell.index_select(0, _cell(scaled).view(-1))
        # Eight at a time, because to look at all takes as long as to look up all.
        places = (codes.view(torch.int64) & ANY_UNDECIDED).nonzero().view(-1)
        decided = torch.searchsorted(boundaries, scaled.view(-1, 8).index_select(0, places), out_int32=True)
        codes.view(-1, 8).index_copy_(0, places, decided.to(torch.uint8))
        pairs = codes.view(torch.int16)  # little-endian: the first is the lower byte
        packed[start // 2 :][: len(pairs)] = (pairs << 4) | (pairs >> 8)
    return packed.view(-1, 1), absmax


@lru_cache
def _tables(code: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boundaries between codes, and the code of each cell, or `UNDECIDED` if it holds a boundary.

    This is exact, because cells ascend with the values: a value in an earlier cell than a boundary is below it.
    """
    # On any default device and dtype, since later calls get the same tables.
    values = torch.tensor(code, dtype=torch.float32, device="cpu")
    boundaries = (values[1:] + values[:-1]) / 2
    cells = _cell(boundaries)
    code_of_cell = torch.searchsorted(cells, torch.arange(CELLS + 1, dtype=cells.dtype, device="cpu")).to(torch.uint8)
    code_of_cell[cells] = UNDECIDED
    return boundaries, code_of_cell


def _cell(scaled: torch.Tensor) -> torch.Tensor:
    return (scaled + 1).mul_(CELLS // 2).int()
