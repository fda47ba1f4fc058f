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


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    update: torch.Tensor,
    magnitude: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = c ∘ (x Wᵀ + (x ∘ mask) Uᵀ) + bias in fp32, c = magnitude / ‖W + U‖ by row without a gradient of the norm."""
    x = x.float()
    y = x @ weight.float().T + (x if mask is None else x * mask.float()) @ update.T
    if magnitude is not None:
        y = y * (magnitude / (weight.float() + update).detach().norm(dim=1))
    return y if bias is None else y + bias.float()
