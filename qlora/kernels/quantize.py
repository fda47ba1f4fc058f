"""Quantization to 4-bit codes on a CPU, by a lookup table instead of a search."""

import math

import torch

# Cells of [-1, 1]; so narrow that no cell holds two boundaries between codes.
CELLS = 8192
# Values at a time for each thread, so that temporary tensors stay in its cache.
CHUNK = 1 << 16
# Smallest absmax to divide by, as in bitsandbytes.
LEAST = 1e-38


def quantize_4bit_cpu(weight: torch.Tensor, code: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale blocks of a weight by their largest magnitude, and take the nearest code of each value.

    Bit-equal to bitsandbytes 0.50 on a CPU, whose search takes several times as long. A value halfway between two codes
    gets the lower one, NaN the highest.

    Args:
        weight: On a CPU, in fp32, bf16 or fp16; its size is a multiple of `block_size`.
        code: (16,) fp32, ascending from -1 to 1.
        block_size: Values that share an absmax, a power of two up to 4096.

    Returns:
        The codes, (numel / 2, 1) uint8, the first of each pair in the upper half; and the absmax, (blocks,) fp32.
    """
    lower, boundary = _tables(code)
    values = weight.reshape(-1)
    packed = torch.empty(len(values) // 2, dtype=torch.uint8)
    absmax = torch.empty(len(values) // block_size)
    chunk = CHUNK * torch.get_num_threads()
    for start in range(0, len(values), chunk):
        blocks = values[start : start + chunk].float().view(-1, block_size)
        largest = absmax[start // block_size :][: len(blocks)]
        torch.amax(blocks.abs(), dim=1, out=largest)
        scaled = blocks * (1 / largest.clamp(min=LEAST)).view(-1, 1)
        scaled = scaled.clamp_(-1, 1).nan_to_num_(1).view(-1)
        cell = _cell(scaled)
        codes = lower.index_select(0, cell).add_(scaled > boundary.index_select(0, cell))
        pairs = codes.view(torch.int16)  # little-endian: the first is the lower byte
        packed[start // 2 :][: len(pairs)] = (pairs << 4) | (pairs >> 8)
    return packed.view(-1, 1), absmax


def _tables(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each cell the code below its boundary, and the boundary; without one, its only code and infinity.

    This is exact, because cells ascend with the values: a value in an earlier cell than a boundary is below it.
    """
    boundaries = (code[1:] + code[:-1]) / 2
    cells = _cell(boundaries)
    lower = torch.searchsorted(cells, torch.arange(CELLS + 1, dtype=cells.dtype))
    boundary = torch.full((CELLS + 1,), math.inf)
    boundary[cells] = boundaries
    return lower.to(torch.uint8), boundary


def _cell(scaled: torch.Tensor) -> torch.Tensor:
    return ((scaled + 1) * (CELLS // 2)).int()
