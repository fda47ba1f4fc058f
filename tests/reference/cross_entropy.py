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
    label_smoothing: float = 0.0,
    by_probability: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, a scalar, and the gradient of `hidden`, both fp32."""
    hidden = hidden.detach().float().requires_grad_()
    losses = token_losses(
        hidden, weight.detach().float(), labels, None if bias is None else bias.float(), logit_scale, softcap,
        label_smoothing, by_probability,
    )  # fmt: skip
    loss = losses.sum() if row_weights is None else (losses * row_weights).sum()
    (grad,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), grad


def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    by_probability: bool = False,
) -> torch.Tensor:
    """Return the loss of each row, (rows,), in the dtype of the inputs and with their graph."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if by_probability:
        losses = losses * logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1).detach()
    return losses
