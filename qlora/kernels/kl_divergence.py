"""KL divergence of two models' predictions, head included, in chunks: their logits never exist for a whole batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora.kernels.head import Head, apply_norm, bytes_per_logit, default_chunk, scale_gradients, transform_logits
from qlora.kernels.simulated import device_of

# Bytes of a logit in fp32 at a chunk's peak: four buffers. One more is in the compute dtype.
FP32_BYTES = 16


def linear_kl_divergence(
    hidden: torch.Tensor,
    weight: Sequence[torch.Tensor],
    base_hidden: torch.Tensor,
    base_weight: Sequence[torch.Tensor],
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_weights: torch.Tensor | None = None,
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Compute the weighted sum over rows of KL(base ‖ model) = Σ p_base · (log p_base - log p).

    The gradient of `hidden` is computed together with the divergence, chunk by chunk; the base gets none. Trained
    blocks of the head get their gradient the same way, summed in fp32. Equal predictions have a divergence and a
    gradient of exactly zero.

    Args:
        hidden: The model's hidden states, (rows, features), in the compute dtype.
        weight: Consecutive blocks of the rows of the model's head, (vocabulary, features) in all.
        base_hidden: The base's hidden states, (rows, features), ready for its head.
        base_weight: Blocks of the base's head.
        bias: (vocabulary,), the bias of both heads.
        logit_scale: See :func:`qlora.kernels.linear_cross_entropy`, as for the arguments that follow.
        softcap: Soft cap of both models' logits.
        row_weights: (rows,), fp32; with None, every row has weight 1.
        norm: Norm applied to each row of `hidden` first; not to `base_hidden`.
        chunk_elements: Logits held at a time; default: as many bytes as the cross-entropy holds on a GPU; on a CPU,
            48 MiB in 16 bits.

    Returns:
        A scalar, fp32.
    """
    blocks = tuple(weight)
    chunk = chunk_elements
    if chunk is None:
        device, dtype = device_of(hidden), hidden.dtype
        # A CPU's cross-entropy holds little in fp32. With as few bytes, the heads would be read too often here.
        held = 4 + dtype.itemsize if device.type == "cpu" else bytes_per_logit(device, dtype)
        of_cross_entropy = default_chunk(hidden.device, sum(map(len, blocks)), dtype)
        chunk = of_cross_entropy * held // (FP32_BYTES + dtype.itemsize)
    if not torch.is_grad_enabled():  # otherwise gradients would be computed for no one
        hidden, blocks = hidden.detach(), tuple(block.detach() for block in blocks)
    base = base_hidden.detach(), tuple(block.detach() for block in base_weight)
    return _LinearKL.apply(hidden, base, bias, logit_scale, softcap, row_weights, norm, chunk, *blocks)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        base: tuple[torch.Tensor, tuple[torch.Tensor, ...]],
        bias: torch.Tensor | None,
        logit_scale: float,
        softcap: float | None,
        row_weights: torch.Tensor | None,
        norm: Callable[[torch.Tensor], torch.Tensor] | None,
        chunk_elements: int,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        base_hidden, base_weights = base
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        head = Head(weights, bias, hidden.dtype, ctx.needs_input_grad[-len(weights) :])
        base_head = Head(base_weights, bias, hidden.dtype, [False] * len(base_weights))
        chunk = min(max(1, chunk_elements // head.size), max(1, hidden.shape[0]))
        products = torch.empty(chunk, head.size, dtype=hidden.dtype, device=hidden.device)

        def logits_of(own_head: Head, states: torch.Tensor) -> torch.Tensor:
            product = products[: len(states)]
            own_head.multiply(states, product)
            copied = torch.empty_like(product, dtype=torch.float32).copy_(product)
            return transform_logits(copied, logit_scale, softcap)

        def add(rows: slice) -> None:
            """Add the divergence of a chunk's rows, whose buffers are freed before the next chunk takes its own."""
            inputs, normed = apply_norm(hidden[rows], norm, grad_hidden is not None)
            difference = torch.log_softmax(logits_of(base_head, base_hidden[rows]), dim=1)
            probabilities = difference.exp()
            logits = logits_of(head, normed.detach())
            logs = torch.log_softmax(logits, dim=1)
            losses = difference.sub_(logs).mul_(probabilities).sum(dim=1)
            del difference
            total.add_(losses.sum() if row_weights is None else losses @ row_weights[rows])
            if not needs_grad:
                return
            grad_logits = logs.exp_().sub_(probabilities)
            if softcap is not None:
                grad_logits.mul_(logits.div_(softcap).square_().neg_().add_(1))
            if logit_scale != 1.0:
                grad_logits.mul_(logit_scale)
            if row_weights is not None:
                grad_logits.mul_(row_weights[rows, None])
            product = products[: len(normed)].copy_(grad_logits)
            exact = grad_logits if head.is_trained else None
            head.go_back(product, inputs, normed, None if grad_hidden is None else grad_hidden[rows], exact)

        for start in range(0, hidden.shape[0], chunk):
            add(slice(start, start + chunk))
        ctx.save_for_backward(grad_hidden, *head.grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *grads = scale_gradients(ctx.saved_tensors, grad_output)
        return grad_hidden, *(None,) * 7, *grads
