"""Output head and cross-entropy in one operation, in chunks: the logits of a batch never exist at once."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qlora.kernels.dequantize import HAS_TRITON, is_traced
from qlora.kernels.fused import describe_failure
from qlora.kernels.head import (
    Head,
    apply_norm,
    default_chunk,
    fp32_blocks,
    fp32_buffer,
    scale_gradients,
    slope_of,
    transform_logits,
)
from qlora.kernels.simulated import device_of

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Variant:
    """What the kernel is compiled for, and the numbers that it is launched with.

    Attributes:
        device: Device of the logits.
        dtype: Their dtype.
        size: Number of logits of a row.
        logit_scale: See :func:`linear_token_loss`, as `softcap`, `label_smoothing` and `by_probability`.
        softcap: Soft cap of the logits.
        is_weighted: Whether rows have weights.
        label_smoothing: Share of each target that is spread evenly.
        by_probability: Whether losses are multiplied by probabilities.
        needs_grad: Whether gradients are computed.
    """

    device: torch.device
    dtype: torch.dtype
    size: int
    logit_scale: float = 1.0
    softcap: float | None = None
    is_weighted: bool = False
    label_smoothing: float = 0.0
    by_probability: bool = False
    needs_grad: bool = True


# Why the kernel is not used for a variant, or None if it gave what torch gives.
_reasons: dict[Variant, str | None] = {}


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
        logit_scale: Factor on the logits (Cohere, Falcon H1, Granite).
        softcap: Logits become softcap · tanh(logits / softcap) (Gemma 2).
        row_weights: (rows,), fp32; with None, every row has weight 1.
        norm: Norm applied to each row of `hidden` first. Its gradient is computed here too, so its output is not saved.
        chunk_elements: Logits held at a time; default: :func:`default_chunk` of the device.

    Returns:
        A scalar, fp32.
    """
    loss, _ = linear_token_loss(
        hidden, weight, labels, bias, logit_scale, softcap, row_weights, norm, chunk_elements=chunk_elements
    )
    return loss


def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_weights: torch.Tensor | None = None,
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    label_smoothing: float = 0.0,
    by_probability: bool = False,
    chunk_elements: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a variant of :func:`linear_cross_entropy`, and the plain cross-entropy with it.

    Args:
        hidden: See :func:`linear_cross_entropy`, as all arguments that are not described here.
        weight: The head's weight.
        labels: Token ids.
        bias: The head's bias.
        logit_scale: Factor on the logits.
        softcap: Soft cap of the logits.
        row_weights: Weight of each row.
        norm: Norm applied to `hidden` first.
        label_smoothing: Share of each target that is spread evenly over the vocabulary, as in
            `torch.nn.functional.cross_entropy`.
        by_probability: Multiply each row's loss by the probability of its label, which gets no gradient
            (DFT, arXiv:2508.05629).
        chunk_elements: Logits held at a time.

    Returns:
        The loss and the plain cross-entropy, scalars in fp32; only the loss has a gradient.
    """
    blocks = (weight,) if isinstance(weight, torch.Tensor) else tuple(weight)
    if not torch.is_grad_enabled():  # otherwise gradients would be computed for no one
        hidden, blocks = hidden.detach(), tuple(block.detach() for block in blocks)
    size = sum(map(len, blocks))
    chunk = default_chunk(hidden.device, size, hidden.dtype) if chunk_elements is None else chunk_elements
    options = (bias, logit_scale, softcap, row_weights, norm, label_smoothing, by_probability, chunk)
    loss, cross_entropy = _LinearTokenLoss.apply(hidden, labels, *options, *blocks)
    return loss, cross_entropy


class _LinearTokenLoss(torch.autograd.Function):
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
        label_smoothing: float,
        by_probability: bool,
        chunk_elements: int,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, plain = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        head = Head(weights, bias, hidden.dtype, ctx.needs_input_grad[-len(weights) :])
        chunk = min(max(1, chunk_elements // head.size), max(1, hidden.shape[0]))
        # One pair of buffers for all chunks: on a CPU, fresh memory costs more than the arithmetic done in it.
        products = torch.empty(chunk, head.size, dtype=hidden.dtype, device=hidden.device)
        options = (logit_scale, softcap, row_weights is not None, label_smoothing, by_probability, needs_grad)
        variant = Variant(device_of(hidden), hidden.dtype, head.size, *options)
        # Gradients of trained blocks are products of gradients of logits in fp32, which the kernel does not give.
        is_fused = not head.is_trained and not is_traced(hidden)
        is_fused = is_fused and unfused_reason(variant, try_kernel=not hidden.is_meta) is None
        in_fp32 = None if is_fused else fp32_buffer(products, head.is_trained)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            inputs, normed = apply_norm(hidden[rows], norm, grad_hidden is not None)
            product = products[: len(normed)]
            head.multiply(normed.detach(), product)
            weights_here = None if row_weights is None else row_weights[rows]
            if in_fp32 is None:
                losses, plain_losses = _fused_losses_(
                    product, labels[rows], logit_scale, softcap, weights_here, label_smoothing, by_probability,
                    needs_grad,
                )  # fmt: skip
            else:
                losses, plain_losses = _token_losses_(product, in_fp32, labels[rows], weights_here, variant)
            total += losses.sum()
            plain += plain_losses.sum()
            if needs_grad:
                exact = None if in_fp32 is None or not head.is_trained else in_fp32[: len(product)]
                head.go_back(product, inputs, normed, None if grad_hidden is None else grad_hidden[rows], exact)
        ctx.save_for_backward(grad_hidden, *head.grads)
        ctx.mark_non_differentiable(plain)
        return total, plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_plain: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *grads = scale_gradients(ctx.saved_tensors, grad_loss)
        return grad_hidden, *(None,) * 9, *grads


def _token_losses_(
    product: torch.Tensor,
    in_fp32: torch.Tensor,
    labels: torch.Tensor,
    row_weights: torch.Tensor | None,
    variant: Variant,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute losses and gradient as the kernel does; where one block is the whole chunk, `in_fp32` keeps the gradient.

    Args:
        product: (rows, vocabulary).
        in_fp32: See :func:`qlora.kernels.head.fp32_buffer`.
        labels: See :func:`qlora.kernels.cross_entropy_triton.token_losses_triton_`.
        row_weights: Weight of each row.
        variant: What is computed.
    """
    softcap, label_smoothing = variant.softcap, variant.label_smoothing
    losses, plain = torch.empty(2, len(product), dtype=torch.float32, device=product.device)
    for rows, values in fp32_blocks(product, in_fp32):
        logits, places = transform_logits(values, variant.logit_scale, softcap), labels[rows, None]
        of_labels, largest = logits.gather(1, places), logits.amax(dim=1, keepdim=True)
        means = logits.mean(dim=1) if label_smoothing else None
        slope = None if softcap is None or not variant.needs_grad else slope_of(logits, softcap)
        exponentials = logits.sub_(largest).exp_()
        sums = exponentials.sum(dim=1, keepdim=True)
        norms = (largest + sums.log()).squeeze(1)
        own = norms - of_labels.squeeze(1)
        factors = None if row_weights is None else row_weights[rows]
        plain[rows] = own if factors is None else own * factors
        if variant.by_probability:
            probabilities = own.neg().exp()
            factors = probabilities if factors is None else probabilities * factors
        if means is not None:
            own = own.mul_(1 - label_smoothing).add_(norms - means, alpha=label_smoothing)
        losses[rows] = own if factors is None else own * factors
        if not variant.needs_grad:
            continue
        grad_logits = exponentials.div_(sums)
        if label_smoothing:
            grad_logits.sub_(label_smoothing / product.shape[1])
        grad_logits.scatter_add_(1, places, grad_logits.new_full((1, 1), label_smoothing - 1).expand(places.shape))
        if slope is not None:
            grad_logits.mul_(slope)
            del slope  # before the next block's is allocated
        if variant.logit_scale != 1.0:
            grad_logits.mul_(variant.logit_scale)
        if factors is not None:
            grad_logits.mul_(factors[:, None])
        if product.dtype != grad_logits.dtype:
            product[rows] = grad_logits
    return losses, plain


def _fused_losses_(logits: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.is_meta:  # what the launcher allocates
        losses, plain = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
        return losses, plain
    from qlora.kernels.cross_entropy_triton import token_losses_triton_

    return token_losses_triton_(logits, *arguments)


def loss_path(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return how :func:`linear_token_loss` computes losses of a frozen head on a device in a dtype, and why.

    Returns:
        `fused kernel` or `plain torch`, and the reason, which names any variants for which the kernel is not used.
    """
    device = torch.empty(0, device=device).device  # with its index, as tensors have it
    reason = _unusable_reason(device)
    if reason is not None:
        return "plain torch", reason
    tried = [reason for variant, reason in _reasons.items() if (variant.device, variant.dtype) == (device, dtype)]
    failed = "; ".join(dict.fromkeys(reason for reason in tried if reason is not None))
    if None in tried:
        found = "it gave torch's values here"
        return "fused kernel", f"{found}; plain torch for other losses: {failed}" if failed else found
    return ("plain torch", failed) if failed else ("fused kernel", "if it gives torch's values for the first loss")


def unfused_reason(variant: Variant, try_kernel: bool = True) -> str | None:
    """Return why losses and gradients of logits are computed in plain torch, or None for the kernel.

    The kernel is tried once for each variant; if it is rejected, the reason is logged.

    Args:
        variant: What the kernel is compiled for.
        try_kernel: Try the kernel; False for an estimate, which assumes that it works unless it has been rejected.
    """
    reason = _unusable_reason(variant.device, try_kernel)
    if reason is not None:
        return reason
    if try_kernel and variant not in _reasons:
        what = f"for {variant.size:,} logits a row in {str(variant.dtype).removeprefix('torch.')}"
        try:
            reason = None if kernel_matches(variant) else f"the fused cross-entropy gave other values {what}"
        except Exception as error:  # a kernel compiler can fail in any way, and plain torch works without it
            reason = f"the fused cross-entropy failed {what}: {describe_failure(error)}"
        if reason is not None and reason not in _reasons.values():
            _logger.warning("Losses are computed in plain torch: %s.", reason)
        _reasons[variant] = reason
    return _reasons.get(variant)


def _unusable_reason(device: torch.device, try_kernel: bool = True) -> str | None:
    if device.type != "cuda":
        return "the fused cross-entropy is for CUDA"
    if HAS_TRITON or not (try_kernel or torch.cuda.is_available()):
        return None
    return "Triton is not installed"


@torch.inference_mode(False)
@torch.enable_grad()
def kernel_matches(variant: Variant) -> bool:
    """Return whether the kernel gives torch's losses and gradient for a few rows of random logits, within rounding."""
    from qlora.kernels.cross_entropy_triton import token_losses_triton_

    device, dtype, size, scale = variant.device, variant.dtype, variant.size, variant.logit_scale
    generator = torch.Generator().manual_seed(0)  # not the run's generator, which must not advance
    values = torch.randn(3, size, generator=generator) * (4 / scale)
    labels = torch.tensor([0, int(values[1].argmax()), size - 1], device=device)  # a likely one, and both ends
    logits = values.to(device, dtype)
    weights = torch.tensor([0.5, 1.0, 2.0], device=device) if variant.is_weighted else None
    exact = logits.float().requires_grad_()
    transformed = exact * scale
    if variant.softcap is not None:
        transformed = torch.tanh(transformed / variant.softcap) * variant.softcap
    wanted_plain = F.cross_entropy(transformed, labels, reduction="none")
    wanted = F.cross_entropy(transformed, labels, reduction="none", label_smoothing=variant.label_smoothing)
    if variant.by_probability:
        wanted = wanted * wanted_plain.detach().neg().exp()
    if weights is not None:
        wanted, wanted_plain = wanted * weights, wanted_plain * weights
    (grad,) = torch.autograd.grad(wanted.sum(), exact)
    losses, plain = token_losses_triton_(
        logits, labels, scale, variant.softcap, weights, variant.label_smoothing, variant.by_probability,
        variant.needs_grad,
    )  # fmt: skip
    pairs = ((losses, wanted), (plain, wanted_plain))
    if not all(torch.allclose(one, other.detach(), rtol=1e-4, atol=1e-4) for one, other in pairs):
        return False
    if not variant.needs_grad:
        return True
    limits = torch.finfo(dtype)
    # Most gradients are about as small as a mean probability, and those of a row have very different sizes.
    least = 1e-4 * abs(scale) / size + limits.smallest_normal * limits.eps
    return torch.allclose(logits.float(), grad, rtol=max(limits.eps, 1e-4), atol=least)
