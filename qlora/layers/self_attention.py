"""Self-attention whose queries and keys are rotated in one pass, in place of a model's own.

Models rotate queries and keys in a function of their Python module, which can't be replaced for one model only. So the
layer around it is replaced, but only where a trial shows that it is made of nothing else: projections, norms of heads,
the rotation, and the registered attention function.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora.kernels import rotate
from qlora.layers.attention import NAME, document_attention
from qlora.layers.trial import TOLERANCE, Chooser, is_close
from qlora.lora import linears_of

TRIAL = "qlora_trial"
PROJECTIONS, NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
# Names of the keys and values of earlier tokens, in different versions of transformers.
CACHES = ("cache", "past_key_values")


class SelfAttention(nn.Module):
    """o(attend(rotate(q(x)), rotate(k(x)), v(x))), optionally with norms of the heads before the rotation.

    Args:
        own: The model's layer. It still computes tokens after earlier ones, in generation.
        settings: Arguments that the layer gives to its attention function.
        fused: Whether a kernel computes the rotation.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, own: Any, settings: dict[str, Any], fused: bool) -> None:
        super().__init__()
        self._modules = own._modules  # the same ones, whatever replaces them later
        self._own, self._settings, self._fused = (own,), settings, fused  # in a tuple: it is not a child

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Map (batch, seq, hidden) to (batch, seq, hidden), and None for the weights."""
        own = self._own[0]
        if own.config._attn_implementation != NAME or any(kwargs.get(name) is not None for name in CACHES):
            found: tuple[torch.Tensor, None] = own(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
            )
            return found
        query, key, value = self.heads(hidden_states, *position_embeddings)
        attended, _ = document_attention(own, query, key, value, attention_mask, **kwargs | self._settings)
        return self.o_proj(attended.flatten(2)), None

    def heads(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values, each (batch, heads, seq, head_dim)."""
        outputs = linears_of(x, (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (each.unflatten(-1, (-1, self._own[0].head_dim)) for each in outputs)
        if "q_norm" in self._modules:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, key, cos, sin, self._fused)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def fit_self_attention(own: Any, chooser: Chooser) -> SelfAttention | None:
    """Return what may replace a module of a model, or None if it is no such self-attention or does anything else.

    The module is called with an attention function that records what it is given.

    Args:
        own: The module.
        chooser: Has the random values, and decides whether a kernel computes the rotation.
    """
    names, width = set(dict(own.named_children())), getattr(own, "head_dim", None)
    if names not in (PROJECTIONS, PROJECTIONS | NORMS) or next(own.parameters(recurse=False), None) is not None:
        return None
    if getattr(getattr(own, "config", None), "_attn_implementation", None) != NAME or not width or width % 2:
        return None
    x, cos, sin = (chooser.random_rows(each).unsqueeze(0) for each in (own.q_proj.in_features, width, width))
    try:
        with torch.no_grad(), _recorded(own.config) as given:
            expected, _ = own(x, position_embeddings=(cos, sin), attention_mask=None)
            settings = {name: value for name, value in given["settings"].items() if value is not None}
            fitted = SelfAttention(own, settings, chooser.fuses_rotation(width))
            heads = fitted.heads(x, cos, sin)
            found = fitted.o_proj(_attended(heads[0]).flatten(2))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # it is called in another way
        return None
    pairs = zip((*heads, found), (*given["heads"], expected), strict=True)
    is_same = all(one.shape == other.shape and is_close(one, other, TOLERANCE) for one, other in pairs)
    is_plain = not settings.pop("dropout", 0) and all(isinstance(value, (int, float)) for value in settings.values())
    return fitted if is_same and is_plain else None


@contextmanager
def _recorded(config: Any) -> Iterator[dict[str, Any]]:
    """Let the layers of a config call a function that records its arguments instead of their attention function."""
    from transformers import AttentionInterface

    given: dict[str, Any] = {}

    def record(_: Any, query: Any, key: Any, value: Any, _mask: Any, **settings: Any) -> tuple[torch.Tensor, None]:
        given.update(heads=(query, key, value), settings=settings)
        return _attended(query), None

    AttentionInterface.register(TRIAL, record)
    config._attn_implementation = TRIAL
    try:
        yield given
    finally:
        config._attn_implementation = NAME


def _attended(query: torch.Tensor) -> torch.Tensor:
    """Return what stands for attention's result: the queries in another order, (batch, seq, heads, head_dim)."""
    return query.transpose(1, 2).flip(1)
