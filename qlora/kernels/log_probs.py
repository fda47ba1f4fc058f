"""Output head and the log-probabilities of given tokens, in chunks: the logits of a batch never exist at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora.kernels.head import (
    Head,
    apply_norm,
    default_chunk,
    fp32_blocks,
    fp32_buffer,
    slope_of,
    transform_logits,
)


def linear_log_probs(
    hidden: torch.Tensor,
    weight: Sequence[torch.Tensor],
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Compute the log-probability of each label under `softmax(hidden @ weight.T)`.

    Unlike in :func:`qlora.kernels.linear_cross_entropy`, the factor of each row's gradient may depend on all rows, so
    the backward computes the logits of a chunk a second time.

    Args:
        hidden: (rows, features), in the compute dtype.
        weight: Consecutive blocks of the head's rows, (vocabulary, features) in all. Trained blocks get their gradient,
            summed in fp32; frozen ones get none.
        labels: (rows,), int64; every label is a token id.
        bias: (vocabulary,), the head's bias.
        logit_scale: Factor on the logits (Cohere, Falcon H1, Granite).
        softcap: Logits become softcap · tanh(logits / softcap) (Gemma 2).
        norm: Norm applied to each row of `hidden` first; its output is not saved.
        chunk_elements: Logits held at a time; default: :func:`qlora.kernels.head.default_chunk` of the device.

    Returns:
        (rows,), fp32.
    """
    if chunk_elements is None:
        chunk_elements = default_chunk(hidden.device, sum(map(len, weight)), hidden.dtype)
    return _LinearLogProbs.apply(hidden, labels, bias, logit_scale, softcap, norm, chunk_elements, *weight)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        logit_scale: float,
        softcap: float | None,
        norm: Callable[[torch.Tensor], torch.Tensor] | None,
        chunk_elements: int,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.settings = bias, logit_scale, softcap, norm, chunk_elements
        ctx.save_for_backward(hidden, labels, *weights)
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        head = Head(weights, bias, hidden.dtype, [False] * len(weights))
        for rows, product, in_fp32 in _chunks(hidden, head, chunk_elements):
            _, normed = apply_norm(hidden[rows], norm, False)
            head.multiply(normed.detach(), product)
            places, found = labels[rows, None], result[rows]
            for own, values in fp32_blocks(product, in_fp32):
                logits = transform_logits(values, logit_scale, softcap)
                found[own] = logits.gather(1, places[own]).squeeze(1)
                largest = logits.amax(dim=1, keepdim=True)
                found[own] -= (largest + logits.sub_(largest).exp_().sum(dim=1, keepdim=True).log()).squeeze(1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, labels, *weights = ctx.saved_tensors
        bias, logit_scale, softcap, norm, chunk_elements = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        head = Head(weights, bias, hidden.dtype, ctx.needs_input_grad[-len(weights) :])
        for rows, product, in_fp32 in _chunks(hidden, head, chunk_elements):
            inputs, normed = apply_norm(hidden[rows], norm, grad_hidden is not None)
            head.multiply(normed.detach(), product)
            places, factors = labels[rows, None], logit_scale * grad_output[rows, None]
            for own, values in fp32_blocks(product, in_fp32):
                logits = transform_logits(values, logit_scale, softcap)
                slope = None if softcap is None else slope_of(logits, softcap)
                grad_logits = logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
                grad_logits.div_(-grad_logits.sum(dim=1, keepdim=True))
                ones = grad_logits.new_ones((1, 1)).expand(places[own].shape)
                grad_logits.scatter_add_(1, places[own], ones)
                if slope is not None:
                    grad_logits.mul_(slope)
                    del slope  # before the next block's is allocated
                grad_logits.mul_(factors[own])
                if product.dtype != grad_logits.dtype:
                    product[own] = grad_logits
            exact = in_fp32[: len(product)] if head.is_trained else None
            head.go_back(product, inputs, normed, None if grad_hidden is None else grad_hidden[rows], exact)
        return grad_hidden, *(None,) * 6, *head.grads


def _chunks(
    hidden: torch.Tensor, head: Head, chunk_elements: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield the rows of each chunk, memory for its products with the head, and memory for blocks of logits in fp32."""
    size = min(max(1, chunk_elements // head.size), max(1, len(hidden)))
    products = torch.empty(size, head.size, dtype=hidden.dtype, device=hidden.device)
    in_fp32 = fp32_buffer(products, head.is_trained)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        yield rows, products[: rows.stop - start], in_fp32
