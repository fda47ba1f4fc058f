"""Frozen head and cross-entropy in one, in chunks, so that the logits of a batch never exist at once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Logits held at a time, in elements: 64 MiB in fp32, and rows enough to fill a device at any vocabulary.
CHUNK_ELEMENTS = 1 << 24


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_weights: torch.Tensor | None = None,
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Sum of the cross-entropy of `hidden @ weight.T` against `labels`, each row's by its weight.

    The gradient of `hidden` is computed with the loss, chunk by chunk; the head is frozen and gets none.

    Args:
        hidden: (rows, features), in the compute dtype.
        weight: (vocabulary, features), of the head.
        labels: (rows,), int64, each a real token.
        bias: (vocabulary,), of the head.
        logit_scale: Factor on the logits (Cohere, Granite).
        softcap: Logits become softcap · tanh(logits / softcap) (Gemma 2).
        row_weights: (rows,), fp32; None where every row counts once.
        norm: Applied to `hidden` first, row by row; its gradient is computed here too, so that its output is not kept.
        chunk_elements: Logits held at a time.

    Returns:
        A scalar, fp32.
    """
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, bias, logit_scale, softcap, row_weights, norm, chunk_elements
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        logit_scale: float,
        softcap: float | None,
        row_weights: torch.Tensor | None,
        norm: Callable[[torch.Tensor], torch.Tensor] | None,
        chunk_elements: int,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunk = max(1, chunk_elements // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            normed = inputs = hidden[rows]
            if norm is not None:
                with torch.enable_grad():
                    inputs = inputs.detach().requires_grad_(grad_hidden is not None)
                    normed = norm(inputs)
            logits = F.linear(normed.detach(), weight, bias).float()
            if logit_scale != 1.0:
                logits.mul_(logit_scale)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            places = labels[rows, None]
            losses = (log_sum - logits.gather(1, places)).squeeze(1)
            total += losses.sum() if row_weights is None else losses @ row_weights[rows]
            if grad_hidden is not None:
                grad_logits = _grad_logits(logits, log_sum, places, logit_scale, softcap)
                if row_weights is not None:
                    grad_logits.mul_(row_weights[rows, None])
                torch.mm(grad_logits.to(weight.dtype), weight, out=grad_hidden[rows])
                if norm is not None:
                    (grad_hidden[rows],) = torch.autograd.grad(normed, inputs, grad_hidden[rows])
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 9
        (grad_hidden,) = ctx.saved_tensors
        # In fp32: the factor is 1 / tokens, or a loss scale, and would lose digits or its range in 16 bits.
        grad_hidden = (grad_hidden.float() * grad_output).to(grad_hidden.dtype)
        return (grad_hidden, *(None,) * 8)


def _grad_logits(
    logits: torch.Tensor, log_sum: torch.Tensor, labels: torch.Tensor, logit_scale: float, softcap: float | None
) -> torch.Tensor:
    """Gradient of the summed loss with respect to the head's raw product; takes the place of the logits."""
    slope = None if softcap is None else 1 - (logits / softcap).square()
    grad = logits.sub_(log_sum).exp_()
    grad.scatter_add_(1, labels, grad.new_full((1, 1), -1.0).expand(labels.shape))
    if slope is not None:
        grad.mul_(slope)
    return grad if logit_scale == 1.0 else grad.mul_(logit_scale)
