"""Tensors saved for a backward before what needs them there is computed."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def save_first(*tensors: torch.Tensor) -> torch.Tensor:
    """Saves tensors in a graph node of their own.

    Recomputation stops with the last tensor that is saved. What is computed after this, and saves nothing itself, is
    so not computed again.

    Args:
        tensors: Of which at least one needs a gradient, if there is to be a backward.

    Returns:
        An empty tensor, whose `grad_fn.saved_tensors` they are.
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
