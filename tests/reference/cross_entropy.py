"""Head and summed cross-entropy, each row with its weight, in fp32, with all logits at once."""

import torch


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, a scalar, and the gradient of `hidden`, both fp32."""
    hidden = hidden.detach().float().requires_grad_()
    logits = hidden @ weight.detach().float().T
    if bias is not None:
        logits = logits + bias.detach().float()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = losses.sum() if row_weights is None else (losses * row_weights).sum()
    (grad,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), grad
