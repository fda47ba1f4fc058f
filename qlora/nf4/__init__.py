"""The only interface to bitsandbytes' 4-bit format: quantization, NF4Linear, and 4-bit weights in checkpoint files."""

import logging

from qlora.nf4.checkpoint import (
    QUANT_STATE,
    checkpoint_layout,
    from_checkpoint_tensors,
    statistics_by_weight,
    to_checkpoint_tensors,
)
from qlora.nf4.experts import NF4Experts
from qlora.nf4.linear import NF4Linear
from qlora.nf4.mxfp4 import MXFP4_BLOCK_SIZE
from qlora.nf4.quantize import (
    BLOCK_SIZE,
    MXFP4,
    NESTED_BLOCK_SIZE,
    NF4,
    dequantize,
    dequantize_path,
    dequantize_rows,
    is_bitsandbytes_linear,
    nf4_num_bytes,
    quantize,
    quantize_rows,
)

__all__ = [
    "BLOCK_SIZE",
    "MXFP4",
    "MXFP4_BLOCK_SIZE",
    "NESTED_BLOCK_SIZE",
    "NF4",
    "QUANT_STATE",
    "NF4Experts",
    "NF4Linear",
    "checkpoint_layout",
    "dequantize",
    "dequantize_path",
    "dequantize_rows",
    "from_checkpoint_tensors",
    "is_bitsandbytes_linear",
    "nf4_num_bytes",
    "quantize",
    "quantize_rows",
    "statistics_by_weight",
    "to_checkpoint_tensors",
]

# On import, bitsandbytes warns that an optional inference kernel is absent; qlora never uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
