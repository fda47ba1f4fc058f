"""Output head and cross-entropy in one operation, in chunks: the logits of a batch never exist at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora.kernels.head import Head, apply_norm, default_chunk, scale_gradients, transform_logits


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_weights: torch.Tensor | None = None,
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Compute the weighted sum of the cross-entropy of `hidden @ weight.T` against `labels`.

    The gradient of `hidden` is computed together with the loss, chunk by chunk. Trained blocks of the head get their
    gradient the same way, summed in fp32; frozen blocks get none.

    Args:
        hidden: (rows, features), in the compute dtype.
        weight: (vocabulary, features), the head's weight; or consecutive blocks of its rows, of which some are trained.
        labels: (rows,), int64; every label is a token id.
        bias: (vocabulary,), the head's bias.
        logit_scale: Factor on the logits (Cohere, Granite).
        softcap: Logits become softcap · tanh(logits / softcap) (Gemma 2).
        row_weights: (rows,), fp32; with None, every row has weight 1.
        norm: Norm applied to each row of `hidden` first. Its gradient is computed here too, so its output is not saved.
        chunk_elements: Logits held at a time; default: :func:`default_chunk` of the device.

    Returns:
        A scalar, fp32.
    """
    blocks = (weight,) if isinstance(weight, torch.Tensor) else tuple(weight)
    if not torch.is_grad_enabled():  # otherwise gradients would be computed for no one
        hidden, blocks = hidden.detach(), tuple(block.detach() for block in blocks)
    chunk = default_chunk(hidden.device) if chunk_elements is None else chunk_elements
    return _LinearCrossEntropy.apply(hidden, labels, bias, logit_scale, softcap, row_weights, norm, chunk, *blocks)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        logit_scale: float,
        softcap: float | None,
        row_weights: torch.Tensor | None,
        norm: Callable[[torch.Tensor], torch.Tensor] | None,
        chunk_elements: int,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        head = Head(weights, bias, hidden.dtype, ctx.needs_input_grad[-len(weights) :])
        chunk = min(max(1, chunk_elements // head.size), max(1, hidden.shape[0]))
        # One pair of buffers for all chunks: on a CPU, fresh memory costs more than the arithmetic done in it.
        products = torch.empty(chunk, head.size, dtype=hidden.dtype, device=hidden.device)
        all_logits = products if hidden.dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            inputs, normed = apply_norm(hidden[rows], norm, grad_hidden is not None)
            product = products[: len(normed)]
            head.multiply(normed.detach(), product)
            logits = transform_logits(all_logits[: len(normed)].copy_(product), logit_scale, softcap)
            places = labels[rows, None]
            of_labels, largest = logits.gather(1, places), logits.amax(dim=1, keepdim=True)
            slope = None if softcap is None or not needs_grad else 1 - (logits / softcap).square()
            exponentials = logits.sub_(largest).exp_()
            sums = exponentials.sum(dim=1, keepdim=True)
            losses = (largest + sums.log() - of_labels).squeeze(1)
            total += losses.sum() if row_weights is None else losses @ row_weights[rows]
            if not needs_grad:
                continue
            grad_logits = exponentials.div_(sums)
            grad_logits.scatter_add_(1, places, grad_logits.new_full((1, 1), -1.0).expand(places.shape))
            if slope is not None:
                grad_logits.mul_(slope)
                del slope  # before the next chunk's is allocated
            if logit_scale != 1.0:
                grad_logits.mul_(logit_scale)
            if row_weights is not None:
                grad_logits.mul_(row_weights[rows, None])
            head.go_back(grad_logits, inputs, normed, None if grad_hidden is None else grad_hidden[rows], product)
        ctx.save_for_backward(grad_hidden, *head.grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *grads = scale_gradients(ctx.saved_tensors, grad_output)
        return grad_hidden, *(None,) * 7, *grads
