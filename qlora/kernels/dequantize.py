"""Dequantization of a 4-bit weight, or of some of a stack, in one pass, optionally with the LoRA term added.

The function here and its kernel, :mod:`qlora.kernels.dequantize_triton`, take the same arguments and do bitsandbytes'
arithmetic in the same order: absmax is `nested_code[absmax] · nested_absmax + nested_offset`, a weight is
`code[4 bits] · absmax`. Each operation is rounded to fp32, and the weight once to the requested dtype. The LoRA term is
added in fp32 to this rounded weight, and the sum is rounded once. Without the LoRA term the two functions agree bit for
bit; with it they differ in the order in which the product B A is summed.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

# torch installs Triton with CUDA builds only. It is imported on first use, as the import is slow.
HAS_TRITON = find_spec("triton") is not None
# Columns of a kernel program's tile: enough for whole cache lines of the result, and no more than a block of weights,
# so that each row of the tile has one absmax.
TILE_COLUMNS = 64


def is_traced(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no values to compare, because torch's compiler or a test only follows its shape."""
    from torch._subclasses.fake_tensor import FakeTensor

    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def tile_kind(packed: torch.Tensor, shape: Sequence[int], block_size: int, with_lora: bool) -> tuple[bool, bool]:
    """Return which of its ways a kernel program reads a weight in: each is compiled separately.

    Args:
        packed: The codes, uint8.
        shape: (out, in).
        block_size: Number of weights that share one absmax.
        with_lora: Whether the LoRA term is added; otherwise the weight is read as one row.

    Returns:
        Whether eight codes are read at a time, and whether the rows are a whole number of tiles.
    """
    width = shape[1] if with_lora else shape[0] * shape[1]
    # Memory is allocated at multiples of far more than the four bytes of eight codes.
    in_words = width % 8 == 0 and packed.storage_offset() % 4 == 0
    return in_words, width % min(TILE_COLUMNS, block_size) == 0


def dequantize_4bit_plain(
    packed: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    block_size: int = 64,
    *,
    nested_code: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    nested_block_size: int = 256,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scaling: float = 1.0,
    index: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantize a weight in plain torch, on any device.

    With `index`, weights of a stack are dequantized: its codes, statistics except the tables of codes, and factors have
    one more dimension, the first, and so has the result.

    Args:
        packed: ceil(out · in / 2) bytes, uint8, each with two codes, the first in the upper half.
        code: (16,), fp32, the value of each code.
        absmax: (blocks,), fp32; or uint8 if it is itself quantized, with the `nested_` arguments.
        shape: (out, in) of the weight.
        dtype: Dtype of the result: fp32, bf16 or fp16.
        block_size: Consecutive weights that share one absmax; a power of 2.
        nested_code: (256,), fp32, the value of each code of `absmax`.
        nested_absmax: (ceil(blocks / nested_block_size),), fp32.
        nested_offset: A scalar, fp32, the mean that was subtracted from every absmax.
        nested_block_size: Blocks that share one nested absmax; a power of 2.
        lora_A: (rank, in), bf16, fp16 or fp32; with `lora_B`, `scaling · B A` is added to the rounded weight.
        lora_B: (out, rank), in the dtype of `lora_A`.
        scaling: Factor on B A.
        index: (weights,), int64, the weights of a stack to dequantize.
        out: (out, in) of `dtype`, contiguous; written in place if given. With `index`, (weights, out, in).

    Returns:
        The weight, (out, in); with `index`, (weights, out, in).
    """
    if index is not None:
        stacked = {"nested_absmax": nested_absmax, "nested_offset": nested_offset, "lora_A": lora_A, "lora_B": lora_B}
        weights = [
            dequantize_4bit_plain(
                packed[one], code, absmax[one], shape, dtype, block_size, nested_code=nested_code,
                nested_block_size=nested_block_size, scaling=scaling,
                **{name: None if each is None else each[one] for name, each in stacked.items()},
            )
            for one in index.tolist()
        ]  # fmt: skip
        return torch.stack(weights, out=out)
    pairs, size = packed.flatten(), shape[0] * shape[1]
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[:size]
    if nested_code is not None:
        assert nested_absmax is not None
        assert nested_offset is not None
        groups = nested_absmax.repeat_interleave(nested_block_size)[: absmax.numel()]
        absmax = nested_code[absmax.long()] * groups + nested_offset
    weight = (code[codes.long()] * absmax.repeat_interleave(block_size)[:size]).view(shape)
    if lora_A is not None:
        assert lora_B is not None
        weight = weight.to(dtype).float() + scaling * (lora_B.float() @ lora_A.float())
    if out is None:
        return weight.to(dtype)
    return out.copy_(weight)
