"""Gated products act(gate) · up, as in SwiGLU and GeGLU (arXiv:2002.05202), and their gradients in few passes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

# Parts of the features that are activated one after the other when gradients are overwritten.
PARTS = 8
# Each activation with the operation that writes its input gradient into `grad_input`.
ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Any]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward.grad_input),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward.grad_input),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    ),
}


@dataclass(frozen=True, slots=True)
class GatedProduct:
    """act(gate) · up, each operation rounded to the dtype of its inputs; bit-equal to autograd, gradients included.

    Attributes:
        activation: A key of `ACTIVATIONS`.
        overwrites: Whether the gradient of the result may be overwritten, because nothing else needs it. This saves a
            tensor as wide as the MLP at the point where a layer uses most memory.
        fused: Whether kernels compute it, see :mod:`qlora.kernels.gated_triton`. They differ from autograd in a few
            last bits.
    """

    activation: str
    overwrites: bool = False
    fused: bool = False

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """(…, features), (…, features) -> (…, features)."""
        if self.fused:
            from qlora.kernels.gated_triton import gated_product_triton

            return gated_product_triton(self.activation, gate, up)
        activate, _ = ACTIVATIONS[self.activation]
        return activate(gate).mul_(up)

    def gradients(
        self, grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of gate and up; nothing else is allocated."""
        if self.fused:
            from qlora.kernels.gated_triton import gated_gradients_triton

            return gated_gradients_triton(self.activation, grad_output, gate, up, self.overwrites)
        activate, activate_backward = ACTIVATIONS[self.activation]
        grad_gate = grad_output * up
        activate_backward(grad_gate, gate, grad_input=grad_gate)
        if not (self.overwrites and grad_output.is_contiguous()):
            return grad_gate, activate(gate).mul_(grad_output)
        # In parts, because the whole activation would be another tensor of this size; on contiguous copies, because
        # torch's GELU for non-contiguous tensors differs in some bits.
        for grad_up, part in zip(grad_output.chunk(PARTS, dim=-1), gate.chunk(PARTS, dim=-1), strict=True):
            grad_up.mul_(activate(part.contiguous()))
        return grad_gate, grad_output
