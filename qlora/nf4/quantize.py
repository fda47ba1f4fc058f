"""Weights to NF4 and back, on bitsandbytes' kernels and in its state format.

bitsandbytes brings torch's compiler with it, a second and a half, so it is imported when a weight is at hand.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK_SIZE = 64


def quantize(
    weight: torch.Tensor, double_quant: bool = True, block_size: int = BLOCK_SIZE
) -> tuple[torch.Tensor, "QuantState"]:
    """Quantizes a weight to NF4 (QLoRA, arXiv:2305.14314, §3).

    Args:
        weight: (out, in), fp32, bf16 or fp16. Sizes need not be multiples of the block.
        double_quant: Quantize the blocks' absmax to 8 bits too.
        block_size: Weights that share one absmax.

    Returns:
        The packed codes, (ceil(out * in / 2), 1) uint8, and what is needed to undo it.
    """
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight.contiguous(), blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")


def dequantize(
    packed: torch.Tensor, state: "QuantState", dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Undoes :func:`quantize`, with one rounding from fp32 to `dtype`.

    Args:
        packed: The codes, uint8.
        state: The blocks' statistics.
        dtype: Of the result: fp32, bf16 or fp16, whatever the weight had before.
        out: (out, in) of `dtype`, written in place if given.

    Returns:
        The weight, (out, in).
    """
    from bitsandbytes.functional import dequantize_blockwise

    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).float() + state.offset
    arguments = (packed, absmax, state.blocksize, state.quant_type, state.shape, dtype)
    if out is None:
        return torch.ops.bitsandbytes.dequantize_4bit.default(*arguments)
    if not out.is_cuda:  # bitsandbytes has this kernel's `out` variant for CUDA alone.
        return out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(*arguments))
    torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
    return out


def nf4_num_bytes(packed: torch.Tensor, state: "QuantState") -> int:
    """Bytes that a quantized weight holds, its statistics included."""
    tensors = [packed, state.absmax]
    if state.nested:
        tensors += [state.state2.absmax, state.offset]
    return sum(tensor.nbytes for tensor in tensors)


def from_checkpoint_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, "QuantState"]:
    """Reads a weight out of a checkpoint that bitsandbytes wrote.

    Args:
        tensors: `weight` and its `weight.*` statistics, by those names.

    Returns:
        The packed codes and their state, as :func:`quantize` gives them.
    """
    from bitsandbytes.functional import QuantState

    # `from_dict` empties the mapping that it is given.
    statistics = {name: tensor for name, tensor in tensors.items() if name != "weight"}
    packed = tensors["weight"]
    return packed, QuantState.from_dict(statistics, device=packed.device)


def is_bitsandbytes_linear(module: torch.nn.Module) -> bool:
    """Whether transformers put one of bitsandbytes' own 4-bit linears here."""
    from bitsandbytes.nn import Linear4bit

    return isinstance(module, Linear4bit)
