"""Attention with sinks: a logit per head that takes part in the softmax and has no value (gpt-oss).

With P the softmax over the keys alone, O = P V and its log-sum-exp L, a sink s gives O' = O · σ(L - s) and
L' = log(exp L + exp s). The gradients of the scores are P' ∘ (dO' Vᵀ - rowsum(dO' ∘ O')) with P' = exp(scores - L'),
which is what a kernel's own backward computes if it is given O' and L'. So the sinks cost one multiplication.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qlora.layers.trial import is_close

NAME = "sinks"
# Sizes of the random values that the kernels are tried on.
TRIED_HEADS, TRIED_GROUPS, TRIED_LENGTH, TRIED_WINDOW, TRIED_FEATURES = 4, 2, 24, 5, 64
TOLERANCE = 16  # in units of the dtype's precision

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int | None], torch.Tensor]


def has_sinks(model: nn.Module) -> bool:
    """Return whether a model's attention has sinks."""
    return any(hasattr(module, NAME) for module in model.modules())


def sinks_unusable_reason(attend: Attend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a kernel can't be used with sinks, or None if its outputs and gradients are those of the formula.

    Args:
        attend: Computes attention over one document from query, key, value, sinks and window, as
            :func:`attend_with_sinks` does.
        device: Device of the model; nothing is tried on the meta device.
        dtype: Compute dtype.
    """
    if device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, grad_output = (random(1, TRIED_HEADS, TRIED_LENGTH, TRIED_FEATURES) for _ in range(2))
    k, v = (random(1, TRIED_HEADS // TRIED_GROUPS, TRIED_LENGTH, TRIED_FEATURES) for _ in range(2))
    sinks = random(TRIED_HEADS)
    tolerance = TOLERANCE * torch.finfo(dtype).eps
    for window in (None, TRIED_WINDOW):
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
        try:
            with torch.enable_grad():
                found = attend(q, k, v, sinks, window)
                expected = masked_with_sinks(q, k, v, sinks, None, near_mask(TRIED_LENGTH, window, device))
            pairs = [
                (found, expected),
                *zip(*(torch.autograd.grad(each, inputs, grad_output) for each in (found, expected)), strict=True),
            ]
        except Exception as error:  # kernels raise anything
            return f"the attention kernel fails with sinks: {(str(error) or type(error).__name__).splitlines()[0]}"
        if not all(is_close(one, other, tolerance) for one, other in pairs):
            return "the attention kernel's results with sinks differ from those of the formula"
    return None


def near_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return a causal mask of (length, length): true for the keys that a query sees, at most `window` of them."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def masked_with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, scale: float | None, mask: Any
) -> torch.Tensor:
    """Compute attention with sinks under a mask: each sink is the score of one more key, whose value is zero.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim).
        value: (batch, kv_heads, keys, head_dim).
        sinks: (heads,).
        scale: Factor on the scores; default: 1 / √head_dim.
        mask: (batch or 1, heads or 1, queries, keys) or (queries, keys), boolean or added to the scores; None to see
            all keys.

    Returns:
        (batch, heads, queries, head_dim).
    """
    scores = query.new_zeros((*query.shape[:3], key.shape[2]))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    last = sinks.to(query.dtype).view(1, -1, 1, 1).expand(*query.shape[:3], 1)
    key, value = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, torch.cat((scores, last), dim=-1), scale=scale, enable_gqa=True
    )


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute causal attention with sinks over one document, on a CPU.

    Args:
        query: (1, heads, seq, head_dim).
        key: (1, kv_heads, seq, head_dim).
        value: (1, kv_heads, seq, head_dim).
        sinks: (heads,), frozen.
        scale: Factor on the scores; default: 1 / √head_dim.
        window: Number of tokens that each token sees, itself included.

    Returns:
        (1, heads, seq, head_dim).
    """
    length, mask = query.shape[2], None
    if window is not None and length > window:
        mask = query.new_zeros((length, length)).masked_fill(~near_mask(length, window, query.device), -torch.inf)
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]  # the kernel does not check it
    attended: torch.Tensor = _OneDocument.apply(query, key, value, sinks, scale, mask)
    return attended


def varlen_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    **settings: Any,
) -> torch.Tensor:
    """Compute causal attention with sinks within each document, by `torch.nn.attention.varlen.varlen_attn`.

    Args:
        query: (tokens, heads, head_dim).
        key: (tokens, kv_heads, head_dim).
        value: (tokens, kv_heads, head_dim).
        sinks: (heads,), frozen.
        cu_seq_lens: (documents + 1,), int32: the start of each document, and the end.
        max_length: Number of tokens of the longest document.
        settings: `scale`, `window_size` and `enable_gqa` of varlen_attn.

    Returns:
        (tokens, heads, head_dim).
    """
    attended: torch.Tensor = _Documents.apply(query, key, value, sinks, cu_seq_lens, max_length, settings)
    return attended


class _OneDocument(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, sinks: Any, scale: float | None, mask: Any) -> torch.Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = kernel(query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale)
        output, lse = _with_sinks(output, lse, sinks[:, None])
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale, ctx.mask = scale, mask
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = backward(*grads, *ctx.saved_tensors, 0.0, ctx.mask is None, attn_mask=ctx.mask, scale=ctx.scale)
        return *found, None, None, None


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, sinks: Any, starts: Any, longest: int, settings: dict[str, Any]
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        found: Any = varlen_attn(
            query, key, value, starts, starts, longest, longest, return_aux=AuxRequest(lse=True), **settings
        )
        output, lse = found
        output, lse = _with_sinks(output.transpose(0, 1), lse, sinks[:, None])
        output = output.transpose(0, 1).contiguous()
        ctx.save_for_backward(query, key, value, output, lse, starts)
        ctx.longest, ctx.settings = longest, settings
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, output, lse, starts = ctx.saved_tensors
        window = ctx.settings["window_size"]
        random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # there is no dropout
        found = torch.ops.torch_attn._varlen_attn_backward(
            *grads, query, key, value, output, lse, starts, starts, ctx.longest, ctx.longest, window == (-1, 0),
            random_state, ctx.settings["scale"], list(window),
        )  # fmt: skip
        return *found, None, None, None, None


def _with_sinks(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a kernel's output (…, heads, seq, head_dim) and log-sum-exp (…, heads, seq) with the sinks (heads, 1)."""
    sinks = sinks.to(lse.dtype)
    share = torch.sigmoid(lse - sinks)
    return output * share[..., None].to(output.dtype), torch.logaddexp(lse, sinks)
