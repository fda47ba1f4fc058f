"""4-bit codes and their block statistics to a weight in one pass, if asked for with the LoRA term added.

The function here and its kernel, :mod:`qlora.kernels.dequantize_triton`, take the same arguments and do the same
arithmetic in the same order, bitsandbytes' own: absmax is `nested_code[absmax] · nested_absmax + nested_offset`, a
weight is `code[its 4 bits] · absmax`, each operation rounded to fp32, and the weight once to the dtype asked for. The
LoRA term is added to that, to the weight that is used without it too, in fp32, and the sum rounded once. Without the
LoRA term the functions agree bit for bit; the product B A is summed in an order of its own.
"""

from importlib.util import find_spec

import torch

# torch brings it with CUDA alone. Importing it takes longer than a CPU has use for.
HAS_TRITON = find_spec("triton") is not None
# A program of the kernel takes a tile: long enough for whole cache lines of the result, and no wider than a block of
# weights may be, so that a row of it has one absmax.
TILE_COLUMNS = 64


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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantizes a weight in plain torch, on any device.

    Args:
        packed: Codes, uint8, two to a byte with the first in the upper half: ceil(out · in / 2) of them.
        code: (16,), fp32, what each code stands for.
        absmax: (blocks,), fp32; or uint8 where it is quantized itself, with the `nested_` arguments.
        shape: (out, in) of the weight.
        dtype: Of the result: fp32, bf16 or fp16.
        block_size: Weights in a row that share one absmax; a power of 2.
        nested_code: (256,), fp32, what each code of `absmax` stands for.
        nested_absmax: (ceil(blocks / nested_block_size),), fp32.
        nested_offset: A scalar, fp32, the mean that was taken off every absmax.
        nested_block_size: Blocks that share one nested absmax; a power of 2.
        lora_A: (rank, in), bf16, fp16 or fp32; with `lora_B`, `scaling · B A` is added to the rounded weight.
        lora_B: (out, rank), of the dtype of `lora_A`.
        scaling: Factor on the product of the two.
        out: (out, in) of `dtype`, contiguous, written in place if given.

    Returns:
        The weight, (out, in).
    """
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
