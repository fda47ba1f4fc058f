"""One buffer for all trained parameters and one for their gradients.

Clipping, the update, the all-reduce, paging and the checkpoint become one call each, and state is paged and
quantized to 8 bits regardless of the size of a single factor.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import nn

# Blocks of 8-bit optimizer state hold 256 elements; a parameter that starts on one shares no block.
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive elements of the flat buffer that share a learning rate.

    Attributes:
        name: Name of the group.
        span: The elements; starts and ends on a multiple of `ALIGNMENT`.
        rate: Factor on the learning rate of a step.
    """

    name: str
    span: slice
    rate: float


class FlatParameters:
    """Parameters moved into one flat buffer; each parameter becomes a view of it.

    Args:
        parameters: Names and parameters, all of one dtype on one device.
        group_of: Name of a parameter's group, by the parameter's name. Parameters of a group are adjacent, so that the
            order of the buffer, and of an optimizer's state, depends on the groups but not on their rates.
        rates: Factors on the learning rate by group; 1 for the others.

    Attributes:
        data: (size,), in the parameters' dtype, with unused padding between them.
        grad: (size,), fp32. Micro-batches add up here without losing small terms to bf16.
        names: Names of the parameters, in the buffer's order.
        groups: Groups in the buffer's order; together they cover the buffer.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        group_of: Callable[[str], str] = lambda _: "",
        rates: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        by_group: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in parameters:
            by_group.setdefault(group_of(name), []).append((name, parameter))
        named = [each for group in by_group.values() for each in group]
        self.names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        first = self._parameters[0]
        assert all(parameter.dtype == first.dtype for parameter in self._parameters), "one buffer has one dtype"
        self.groups: list[Group] = []
        offsets, size = [], 0
        for group_name, group in by_group.items():
            start = size
            for _, parameter in group:
                offsets.append(size)
                size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            self.groups.append(Group(group_name, slice(start, size), rates.get(group_name, 1.0)))
        self.data = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros(size, dtype=torch.float32, device=first.device)
        self._grad_views = []
        for parameter, offset in zip(self._parameters, offsets, strict=True):
            view = self.data[offset : offset + parameter.numel()].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad_dtype = None  # any: added to the buffer in one operation, not converted before
            self._grad_views.append(self.grad[offset : offset + parameter.numel()].view_as(parameter))
        self.zero_grad()

    @property
    def num_parameters(self) -> int:
        """Number of trained elements, without the padding between parameters."""
        return sum(parameter.numel() for parameter in self._parameters)

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the factors on the learning rate by group; 1 for the others."""
        self.groups = [replace(group, rate=rates.get(group.name, 1.0)) for group in self.groups]

    def zero_grad(self) -> None:
        """Zero the gradient, and make each parameter's `grad` a view of it again."""
        self.grad.zero_()
        for parameter, view in zip(self._parameters, self._grad_views, strict=True):
            parameter.grad = view

    def clip_grad_norm(self, max_norm: float | None) -> torch.Tensor:
        """Scale the gradient down to `max_norm` if it is larger, without waiting for the device.

        Returns:
            The norm before scaling, a scalar tensor in fp32.
        """
        norm = torch.linalg.vector_norm(self.grad)
        if max_norm is not None:
            self.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
