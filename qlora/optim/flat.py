"""One buffer for all trained parameters and one for their gradients.

Clipping, the update, the all-reduce, paging and the checkpoint become one call each, and state is paged and
held in 8 bits whatever the size of a single factor.
"""

from collections.abc import Iterable

import torch
from torch import nn

# Blocks of 8-bit optimizer state hold 256 elements; a parameter that starts on one shares no block.
ALIGNMENT = 256


class FlatParameters:
    """Moves parameters into one flat buffer, of which each then is a view.

    Args:
        parameters: Names and parameters, all of one dtype on one device.

    Attributes:
        data: (size,), in the parameters' dtype, with padding between them that no one reads.
        grad: (size,), fp32. Micro-batches add up here without losing small terms to bf16.
        names: Of the parameters, in the buffer's order.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        named = list(parameters)
        self.names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        first = self._parameters[0]
        offsets, size = [], 0
        for parameter in self._parameters:
            assert parameter.dtype == first.dtype, "parameters of one buffer share a dtype"
            offsets.append(size)
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.data = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros(size, dtype=torch.float32, device=first.device)
        self._grad_views = []
        for parameter, offset in zip(self._parameters, offsets, strict=True):
            view = self.data[offset : offset + parameter.numel()].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad_dtype = torch.float32
            self._grad_views.append(self.grad[offset : offset + parameter.numel()].view_as(parameter))
        self.zero_grad()

    @property
    def num_parameters(self) -> int:
        """Trained elements, without the padding between parameters."""
        return sum(parameter.numel() for parameter in self._parameters)

    def zero_grad(self) -> None:
        """Zeroes the gradient, and makes each parameter's gradient a view of it again."""
        self.grad.zero_()
        for parameter, view in zip(self._parameters, self._grad_views, strict=True):
            parameter.grad = view

    def clip_grad_norm(self, max_norm: float | None) -> torch.Tensor:
        """Scales the gradient down to `max_norm` if it is larger, without waiting for the device.

        Returns:
            The norm before, a scalar tensor in fp32.
        """
        norm = torch.linalg.vector_norm(self.grad)
        if max_norm is not None:
            self.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
