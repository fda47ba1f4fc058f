"""NF4Linear: a frozen linear layer that holds 4-bit weights and dequantizes on the fly."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qlora.kernels import scratch
from qlora.nf4.quantize import LoraUpdate, dequantize, nf4_num_bytes, quantize


class _DequantizedLinear(torch.autograd.Function):
    """x @ W.T + bias for a frozen W; saves nothing, and dequantizes W again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: "NF4Linear") -> torch.Tensor:
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(x, linear.weight_for_product(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad_output @ ctx.linear.weight_for_product(grad_output.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer in NF4.

    bitsandbytes' own `Linear4bit` is never used in a forward: its inference path repacks the weight in place
    on some CPUs, after which neither gradients nor saved files are right.

    Args:
        packed: Codes, uint8, as :func:`qlora.nf4.quantize` gives them.
        quant_state: The blocks' statistics; its shape is (out_features, in_features).
        bias: (out_features,) or None.
    """

    in_features: int
    out_features: int

    def __init__(self, packed: torch.Tensor, quant_state: Any, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.quant_state = quant_state
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = quant_state.shape
        self._held: torch.Tensor | None = None

    @classmethod
    def from_linear(cls, linear: Any, double_quant: bool = True) -> "NF4Linear":
        """Quantizes an `nn.Linear`, or takes over the weight of bitsandbytes' `Linear4bit` without copying."""
        weight, bias = linear.weight, linear.bias
        state = getattr(weight, "quant_state", None)
        # A plain tensor sheds bitsandbytes' parameter class, whose `.to()` would quantize again.
        packed = weight.data.as_subclass(torch.Tensor)
        if state is None:
            packed, state = quantize(packed, double_quant)
        return cls(packed, state, None if bias is None else bias.data)

    def dequantize(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight, (out_features, in_features), in `dtype`."""
        return dequantize(self.weight, self.quant_state, dtype, out)

    def weight_for_product(
        self, dtype: torch.dtype, update: LoraUpdate | None = None, lasting: bool = False
    ) -> torch.Tensor:
        """The weight for a product that is started at once; to be read only.

        Args:
            dtype: Of the result.
            update: (A, B, scaling); scaling · B A is added to the weight in `dtype`, and the sum rounded once.
            lasting: Whether it is wanted for later too. Else the next call may overwrite it.

        Returns:
            (out_features, in_features).
        """
        on_cpu, held = not self.weight.is_cuda, self._held
        if held is not None and held.dtype != dtype:
            held = None
        if held is not None and update is None:
            return held
        # bitsandbytes gives a new tensor on CPUs, whatever `out` is.
        is_new = lasting or (on_cpu and held is None)
        out = None if is_new else scratch(self.quant_state.shape, dtype, self.weight.device)
        if held is not None and update is not None and on_cpu:
            lora_A, lora_B, scaling = update
            return torch.addmm(held, lora_B, lora_A, alpha=scaling, out=out)
        # On a GPU the fused kernel reads fewer bytes of codes than of a held weight.
        return dequantize(self.weight, self.quant_state, dtype, out, update)

    def hold(self, dtype: torch.dtype) -> None:
        """Keeps the dequantized weight from now on, for products in `dtype`: 2 bytes per parameter in 16 bits."""
        self._held = self.dequantize(dtype)

    def release(self) -> None:
        """Undoes :meth:`hold`."""
        self._held = None

    @property
    def is_held(self) -> bool:
        """Whether the dequantized weight is kept."""
        return self._held is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        return _DequantizedLinear.apply(x, self)

    @property
    def num_bytes(self) -> int:
        """Bytes held by the weight and its statistics."""
        return nf4_num_bytes(self.weight, self.quant_state)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` prints them."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Without the statistics, under bitsandbytes' names, the codes of a saved model would be lost.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.quant_state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{name}"] = tensor

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "NF4Linear":
        # The statistics follow the weight to its device, and never its dtype: they are what undoes it.
        super()._apply(fn, recurse)
        self.release()
        self.quant_state.to(self.weight.device)
        return self
