"""The one door to bitsandbytes' 4-bit: quantize, dequantize, NF4Linear."""

from qlora.nf4.linear import NF4Linear
from qlora.nf4.quantize import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    dequantize,
    dequantize_path,
    from_checkpoint_tensors,
    is_bitsandbytes_linear,
    nf4_num_bytes,
    quantize,
)

__all__ = [
    "BLOCK_SIZE",
    "NESTED_BLOCK_SIZE",
    "NF4Linear",
    "dequantize",
    "dequantize_path",
    "from_checkpoint_tensors",
    "is_bitsandbytes_linear",
    "nf4_num_bytes",
    "quantize",
]
