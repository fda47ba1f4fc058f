"""Weights to 4-bit codes on a CPU: each value's code is looked up by the cell it falls in, and not searched for."""

import math

import torch

# Cells of [-1, 1]; much narrower than the codes are apart, so that no cell holds two of their boundaries.
CELLS = 8192
# Values at a time for each thread: what is made of them stays in its cache.
CHUNK = 1 << 16
# The least absmax that is divided by, as in bitsandbytes.
LEAST = 1e-38


def quantize_4bit_cpu(weight: torch.Tensor, code: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales blocks of a weight by their largest magnitude, and takes the nearest code of each value.

    Bit for bit what bitsandbytes 0.50 gives on a CPU, whose search takes several times as long; a value halfway
    between two codes has the lower one, and NaN the highest.

    Args:
        weight: On a CPU, fp32, bf16 or fp16, of whole blocks.
        code: (16,) fp32, rising from -1 to 1.
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
    """By cell: the code below the boundary that it holds, and that boundary; without one, its only code and infinity.

    Exact, as cells rise with the values: what lies in an earlier cell than a boundary is below it.
    """
    boundaries = (code[1:] + code[:-1]) / 2
    cells = _cell(boundaries)
    lower = torch.searchsorted(cells, torch.arange(CELLS + 1, dtype=cells.dtype))
    boundary = torch.full((CELLS + 1,), math.inf)
    boundary[cells] = boundaries
    return lower.to(torch.uint8), boundary


def _cell(scaled: torch.Tensor) -> torch.Tensor:
    return ((scaled + 1) * (CELLS // 2)).int()
