"""Gated products act(gate) · up, as in SwiGLU and GeGLU (arXiv:2002.05202), and their gradients, in few passes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

# Elements that are activated at a time where their gradients are written over.
BLOCK = 1 << 22
# Each with the operation that writes its gradient, given that of its result, into `grad_input`.
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
    """act(gate) · up, each operation rounded to the dtype of its inputs: the bits that autograd gives, gradients too.

    Attributes:
        activation: A key of `ACTIVATIONS`.
        overwrites: Whether the gradient of the result may be written over, as nobody else needs it: a tensor as wide as
            the MLP less, where a layer's memory is fullest.
    """

    activation: str
    overwrites: bool = False

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """(…, features) and the same -> (…, features)."""
        activate, _ = ACTIVATIONS[self.activation]
        return activate(gate).mul_(up)

    def gradients(
        self, grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of gate and up; no more is allocated than these two."""
        activate, activate_backward = ACTIVATIONS[self.activation]
        grad_gate = grad_output * up
        activate_backward(grad_gate, gate, grad_input=grad_gate)
        if not (self.overwrites and grad_output.is_contiguous() and gate.is_contiguous()):
            return grad_gate, activate(gate).mul_(grad_output)
        for rows in range(0, gate.numel(), BLOCK):  # or the activation is another such tensor
            block = slice(rows, rows + BLOCK)
            grad_output.view(-1)[block].mul_(activate(gate.view(-1)[block]))
        return grad_gate, grad_output
