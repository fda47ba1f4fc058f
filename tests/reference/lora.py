"""A LoRA linear in fp32 by plain autograd."""

from dataclasses import dataclass

import torch


@dataclass
class LoraResult:
    """Results of forward and backward, all fp32."""

    y: torch.Tensor
    grad_x: torch.Tensor
    grad_A: torch.Tensor  # noqa: N815
    grad_B: torch.Tensor  # noqa: N815


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    grad_output: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> LoraResult:
    """y = x Wᵀ + bias + scaling · (x ∘ mask) Aᵀ Bᵀ, and its gradients for `grad_output`."""
    x, A, B = (tensor.detach().float().requires_grad_() for tensor in (x, A, B))
    dropped = x if mask is None else x * mask.float()
    y = x @ weight.detach().float().T + scaling * (dropped @ A.T @ B.T)
    if bias is not None:
        y = y + bias.detach().float()
    grads = torch.autograd.grad(y, (x, A, B), grad_output.float())
    return LoraResult(y.detach(), *grads)
