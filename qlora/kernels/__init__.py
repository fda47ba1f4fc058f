"""Fast operations, each beside its plain-torch twin."""

from qlora.kernels.cross_entropy import linear_cross_entropy
from qlora.kernels.dequantize import HAS_TRITON, dequantize_4bit_plain, dequantize_4bit_triton
from qlora.kernels.rebuild import Recipe, rebuilt
from qlora.kernels.scratch import scratch

__all__ = [
    "HAS_TRITON",
    "Recipe",
    "dequantize_4bit_plain",
    "dequantize_4bit_triton",
    "linear_cross_entropy",
    "rebuilt",
    "scratch",
]
