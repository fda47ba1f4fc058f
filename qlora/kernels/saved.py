"""Saving tensors for the backward before the operation that needs them there."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def save_first(*tensors: torch.Tensor) -> torch.Tensor:
    """Save tensors in a graph node of their own.

    Recomputation stops after the last saved tensor, so operations that follow this call and save nothing themselves are
    not computed again.

    Args:
        tensors: At least one needs a gradient if there is to be a backward.

    Returns:
        An empty tensor; its `grad_fn.saved_tensors` are the tensors.
    """
    return _Saved.apply(*tensors)


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)
