"""The autograd function of a LoRA linear: it saves x, or what x is built from, and not the dequantized weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qlora.kernels import Recipe


def base_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight of a base layer, (out, in), in `dtype`; dequantized when it is held in 4 bits."""
    if isinstance(base, nn.Linear):
        return base.weight.to(dtype)
    return base.dequantize(dtype)


def dropout_mask(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """The scaled mask of inverted dropout, like `x`; the same for the same seed, so it need not be saved."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


class LoraLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ (LoRA, arXiv:2106.09685, eq. 3).

    Shapes: x (..., in), A (rank, in), B (out, rank), y (..., out), all products in the dtype of x. With
    g = dL/dy and u = g B:  dL/dx = g W + scaling · u A,  dL/dA = scaling · uᵀ x,  dL/dB = scaling · gᵀ (x Aᵀ).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        base: Any,
        scaling: float,
        dropout: float,
        seed: int,
        recipe: Recipe | None,
    ) -> torch.Tensor:
        """Computes y; see the class."""
        ctx.source = None if recipe is None else recipe.source.add_user()
        ctx.save_for_backward(lora_A, lora_B, *((x,) if recipe is None else recipe.inputs))
        ctx.base, ctx.scaling, ctx.dropout, ctx.seed = base, scaling, dropout, seed
        rows = x.reshape(-1, x.shape[-1])
        dropped = rows * dropout_mask(rows, dropout, seed) if dropout else rows
        v = dropped @ lora_A.to(x.dtype).T
        bias = None if base.bias is None else base.bias.to(x.dtype)
        y = F.linear(rows, base_weight(base, x.dtype), bias)
        y.addmm_(v, lora_B.to(x.dtype).T, alpha=scaling)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B; see the class."""
        lora_A, lora_B, *inputs = ctx.saved_tensors
        x = inputs[0] if ctx.source is None else ctx.source.build(*inputs)
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        mask = dropout_mask(rows, ctx.dropout, ctx.seed) if ctx.dropout else None
        dropped = rows if mask is None else rows * mask

        u = (grad @ B).mul_(ctx.scaling)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ base_weight(ctx.base, grad.dtype)
            if mask is None:
                grad_x.addmm_(u, A)
            else:
                grad_x.addcmul_(u @ A, mask)
            grad_x = grad_x.view_as(x)
        if ctx.needs_input_grad[1]:
            grad_A = u.T @ dropped
        if ctx.needs_input_grad[2]:
            grad_B = grad.T @ (dropped @ A.T).mul_(ctx.scaling)
        return grad_x, grad_A, grad_B, *(None,) * 5
