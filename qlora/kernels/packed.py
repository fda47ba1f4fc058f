"""Weights in oneDNN's own layout, whose products with few rows take less time on a CPU.

torch's compiler uses these operations for frozen weights. The results are those of `F.linear`, which oneDNN computes
too: only the order in which the weight lies in memory differs. With a bias, a result may differ by one rounding.
"""

from typing import Any

import torch


class PackedWeight:
    """A copy of a weight in oneDNN's layout, for products without gradients.

    Use it only where :func:`can_pack` returns True.

    Args:
        weight: (out, in), bf16 on a CPU.
        bias: (out,), bf16, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self._bias = bias

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + bias, (rows, out), for x of (rows, in) in bf16."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether weights are packed here: in bf16, on an x86 processor with AVX-512 that computes in it."""
    if device.type != "cpu" or dtype != torch.bfloat16 or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    operations = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(operations, name) for name in names) and bool(operations._is_mkldnn_bf16_supported())
