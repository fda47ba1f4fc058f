"""Quantization to 4-bit codes on a CPU, by a lookup table instead of a search for nearly all values."""

import math
from functools import lru_cache

import torch

# Cells of [-1, 1]; so narrow that one value in two thousand is in a cell with a boundary between codes.
CELLS = 1 << 15
# In place of the code of such a cell, and of eight of them.
UNDECIDED = 16
ANY_UNDECIDED = 0x1010101010101010
# Factor that adds the lower byte of an int16, moved up by four bits, to the upper one.
SHIFT_AND_ADD = (1 << 12) + 1
# Values at a time for each thread, so that temporary tensors stay in its cache; with half as many, calls take longer.
CHUNK = 1 << 18
# Smallest absmax to divide by, as in bitsandbytes.
LEAST = 1e-38
# bf16 numbers as integers: 1, 2 and the smallest absmax that is looked up by bits, 2⁻⁶⁴; the number of negative int16.
ONE_BITS, TWO_BITS, LEAST_BITS = 127 << 7, 128 << 7, 63 << 7
NEGATIVE = 1 << 15
# From the lowest negative int16 up to the bits of 2.
BF16_VALUES = NEGATIVE + TWO_BITS


def quantize_4bit_cpu(
    weight: torch.Tensor, code: torch.Tensor, block_size: int, packed: torch.Tensor, absmax: torch.Tensor
) -> None:
    """Scale blocks of a weight by their largest magnitude, and take the nearest code of each value.

    Bit-equal to bitsandbytes 0.50 on a CPU, whose search takes several times as long. A value halfway between two codes
    gets the lower one, NaN the highest.

    Args:
        weight: On a CPU, in fp32, bf16 or fp16; its size is a multiple of `block_size`.
        code: (16,) fp32, ascending from -1 to 1.
        block_size: Values that share an absmax, a power of two from 8 to 4096.
        packed: Gets the codes, (numel / 2,) uint8, the first of each pair in the upper half.
        absmax: Gets the largest magnitudes, (blocks,) fp32.
    """
    key, values = tuple(code.tolist()), weight.reshape(-1)
    chunk = CHUNK * torch.get_num_threads()
    for start in range(0, len(values), chunk):
        blocks = values[start : start + chunk].view(-1, block_size)
        largest = absmax[start // block_size :][: len(blocks)]
        codes = _codes_of_bf16(blocks, key, largest) if weight.dtype == torch.bfloat16 else None
        if codes is None:
            codes = _codes(blocks.float(), key, largest)
        # Little-endian: a pair is first + (second << 8), and the upper byte of its product (first << 4) + second.
        pairs = codes.view(torch.int16).mul_(SHIFT_AND_ADD).bitwise_right_shift_(8)
        packed[start // 2 :][: len(pairs)] = pairs


def _codes_of_bf16(blocks: torch.Tensor, code: tuple[float, ...], absmax: torch.Tensor) -> torch.Tensor | None:
    """Look up codes by the bits of the values, as if each block had its absmax in [1, 2).

    A quotient does not change if both numbers are multiplied by a power of two, so a table by the 7 bits of the
    absmax's mantissa and the bits of the value has every code, and nothing is left to a search.

    Returns:
        The codes, (numel,) uint8; None if powers of two may change the quotient of a block, because its absmax is tiny
        or not finite, or if an absmax is 2 or more, which the table does not hold.
    """
    bits = blocks.view(torch.int16)
    largest = torch.amax(bits & 0x7FFF, dim=1)  # magnitudes are in the order of their bits
    least, most = largest.aminmax()
    if least < LEAST_BITS or most >= TWO_BITS:
        return None
    absmax.copy_(largest.view(torch.bfloat16))
    # A bf16 number has its exponent above 7 bits of mantissa, so to subtract `largest` without its mantissa, which is
    # added again here, moves the exponent to that of 1.
    first = (largest & 0x7F).int().mul_(BF16_VALUES + 1).add_(NEGATIVE + ONE_BITS).sub_(largest)
    return _bf16_table(code).index_select(0, bits.int().add_(first.view(-1, 1)).view(-1))


def _codes(blocks: torch.Tensor, code: tuple[float, ...], absmax: torch.Tensor) -> torch.Tensor:
    """Return the codes of blocks in fp32, (numel,) uint8: looked up by cells, and searched for in a few of them."""
    boundaries, code_of_cell = _tables(code)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    scaled = blocks * (1 / absmax.clamp(min=LEAST)).view(-1, 1)
    if not math.isfinite(absmax.max()):
        scaled = scaled.clamp_(-1, 1).nan_to_num_(1)
    codes = code_of_cell.index_select(0, _cell(scaled).view(-1))
    # Eight at a time, because to look at all takes as long as to look up all.
    places = (codes.view(torch.int64) & ANY_UNDECIDED).nonzero().view(-1)
    decided = torch.searchsorted(boundaries, scaled.view(-1, 8).index_select(0, places), out_int32=True)
    codes.view(-1, 8).index_copy_(0, places, decided.to(torch.uint8))
    return codes


@lru_cache
def _bf16_table(code: tuple[float, ...]) -> torch.Tensor:
    """Return the code of each value by the mantissa of its block's absmax, (128 * BF16_VALUES,) uint8.

    For each mantissa, the values of magnitudes below 2 in the order of their bits as int16: the negative ones, then a
    gap, then the others.
    """
    boundaries, _ = _tables(code)
    bits = torch.arange(TWO_BITS, dtype=torch.int16, device="cpu")
    magnitudes = bits.view(torch.bfloat16).float()
    scales = 1 / magnitudes[ONE_BITS:].view(-1, 1)
    table = torch.empty(len(scales), BF16_VALUES, dtype=torch.uint8, device="cpu")
    for start, sign in ((0, -1), (NEGATIVE, 1)):
        table[:, start : start + TWO_BITS] = torch.searchsorted(boundaries, sign * magnitudes * scales, out_int32=True)
    return table.view(-1)


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
