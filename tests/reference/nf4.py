"""NF4 by the paper (QLoRA, arXiv:2305.14314, §3 and appendix E): one value after another."""

import torch

CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def absmax_per_value(weight: torch.Tensor, block_size: int = 64) -> torch.Tensor:
    """Return the largest magnitude of each value's block, flat; the last block may be short."""
    blocks = weight.detach().float().flatten().split(block_size)
    return torch.cat([block.abs().max().expand(len(block)) for block in blocks])


def quantize(weight: torch.Tensor, block_size: int = 64) -> torch.Tensor:
    """Return the index of the nearest code value for each weight, (out * in,)."""
    absmax = absmax_per_value(weight, block_size)
    scaled = weight.detach().float().flatten() / absmax.where(absmax > 0, 1)
    return (scaled[:, None] - CODE).abs().argmin(dim=1)


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return code values times each value's absmax, fp32."""
    return (CODE[codes] * absmax).view(shape)


def double_quant_bound(absmax: torch.Tensor, group: int = 256) -> torch.Tensor:
    """Return how far each block's absmax, (blocks,), may move when it is stored in 8 bits.

    The mean of all absmax is subtracted, and the rest is quantized in groups of 256. The 8-bit code's widest gap,
    relative to the largest of its group, is 0.9 / 64 (64 steps between 0.1 and 1): half of it is the error.
    """
    centered = absmax - absmax.mean()
    largest = torch.cat([part.abs().max().expand(len(part)) for part in centered.split(group)])
    # bitsandbytes finds the code in a table on CPUs, and next to a boundary takes the other one: a grid of 2^16
    # steps from -1 to 1. The last term is the rounding of fp32.
    return largest * (0.9 / 64 / 2 + 2**-15) + absmax * 1e-6


def unpack(packed: torch.Tensor, num_values: int) -> torch.Tensor:
    """Return the codes from bytes that hold two each, the first in the upper half."""
    pairs = packed.flatten().long()
    return torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[:num_values]
