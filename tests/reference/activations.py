"""Norms and gated products as models write them, in fp64 by plain autograd."""

import math
from collections.abc import Callable

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act(gate) · up, for SiLU, GELU and GELU by tanh."""
    if activation == "silu":
        return gate / (1 + (-gate).exp()) * up
    if activation == "gelu":
        return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * up
    return gate * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh()) / 2 * up


def with_gradients(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad_output: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Return a function's result for inputs in a dtype, and their gradients."""
    inputs = [each.detach().to(dtype).requires_grad_() for each in inputs]
    result = function(*inputs)
    return (result.detach(), *torch.autograd.grad(result, inputs, grad_output.to(dtype)))
