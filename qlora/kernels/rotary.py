"""Rotary position embeddings of queries and keys (RoPE, arXiv:2104.09864), in few passes."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fused: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate each half of the features of queries and keys with the other half: x ∘ cos + (-x₂, x₁) ∘ sin.

    Each product is rounded to the dtype, and so is the sum, as in transformers' `apply_rotary_pos_emb`.

    Args:
        query: (batch, seq, heads, head_dim), with an even head_dim.
        key: (batch, seq, kv_heads, head_dim).
        cos: (batch, seq, head_dim), or (1, seq, head_dim) for all rows of the batch; of the dtype of `query`.
        sin: Like `cos`.
        fused: Use the kernel.

    Returns:
        The rotated queries and keys.

    Raises:
        ValueError: The angles are not as wide as the heads, as in models that rotate a part of the features.
    """
    widths = [tensor.shape[-1] for tensor in (query, key, cos, sin)]
    if len(set(widths)) > 1:
        raise ValueError(
            f"queries, keys, cos and sin have {', '.join(map(str, widths))} features; rotations of a part of the "
            "features are not supported, so pass that part alone"
        )
    rotated: tuple[torch.Tensor, torch.Tensor] = _Rotate.apply(query, key, cos, sin, fused)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fused: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.fused = fused
        return _rotated(query, key, cos, sin, fused, is_backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotated(grad_query, grad_key, cos, sin, ctx.fused, is_backward=True), None, None, None


def _rotated(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fused: bool, is_backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if fused:
        from qlora.kernels.rotary_triton import rotate_triton

        return rotate_triton(query, key, cos, sin, is_backward)
    return _rotated_plain(query, cos, sin, is_backward), _rotated_plain(key, cos, sin, is_backward)


def _rotated_plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_backward: bool) -> torch.Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    out = x * cos
    (first, second), (sin_first, sin_second) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    if is_backward:
        out_first.add_(second * sin_second)
        out_second.sub_(first * sin_first)
    else:
        out_first.sub_(second * sin_first)
        out_second.add_(first * sin_second)
    return out
