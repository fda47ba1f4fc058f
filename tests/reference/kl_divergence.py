"""KL(base ‖ model) of two heads' predictions, in fp32, with all logits at once."""

from typing import Any

import torch
import torch.nn.functional as F


def linear_kl_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    base_hidden: torch.Tensor,
    base_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the divergence, and the gradients of `hidden` and `weight`, all fp32."""
    hidden, weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))

    def log_probabilities(states: torch.Tensor, head: torch.Tensor) -> Any:
        logits = states @ head.T
        if bias is not None:
            logits = logits + bias.float()
        logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.log_softmax(logits, dim=1)

    base = log_probabilities(base_hidden.float(), base_weight.float())
    rows = F.kl_div(log_probabilities(hidden, weight), base, reduction="none", log_target=True).sum(1)
    total = rows.sum() if row_weights is None else (rows * row_weights).sum()
    grad_hidden, grad_weight = torch.autograd.grad(total, (hidden, weight))
    return total.detach(), grad_hidden, grad_weight
