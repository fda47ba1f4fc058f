"""Log-probabilities of labels, in fp32, with all logits at once."""

import torch
import torch.nn.functional as F


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    grad: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the log-probabilities, and the gradients of `hidden` and `weight` for the gradient `grad` of each."""
    hidden, weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias.float()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = -F.cross_entropy(logits, labels, reduction="none")
    return found.detach(), *torch.autograd.grad(found, (hidden, weight), grad)
