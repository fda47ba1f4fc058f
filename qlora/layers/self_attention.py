"""Self-attention whose queries and keys are rotated in one pass, in place of a model's own.

Models rotate queries and keys in a function of their Python module, which can't be replaced for one model only. So the
layer around it is replaced, but only where a trial shows that it is made of nothing else: projections, norms of heads,
the rotation, and the registered attention function. The trial needs none of the model's values, so a model on the meta
device gets the same layers as one with weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qlora.kernels import rotate
from qlora.layers.attention import NAME, document_attention
from qlora.layers.trial import PROBE_ROWS, TOLERANCE, Chooser, is_close, stand_ins
from qlora.lora import linears_of
from qlora.out_of_memory import is_out_of_memory

TRIAL = "qlora_trial"
PROJECTIONS, NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
# Names of the keys and values of earlier tokens, in different versions of transformers.
CACHES = ("cache", "past_key_values")


class SelfAttention(nn.Module):
    """o(attend(rotate(q(x)), rotate(k(x)), v(x))), optionally with norms of the heads before the rotation.

    Args:
        own: The model's layer. It still computes tokens after earlier ones, in generation, and angles that were not
            tried: for a part of the features, in another dtype than the hidden states, or none.
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
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Map (batch, seq, hidden) to (batch, seq, hidden), and None for the weights."""
        own = self._own[0]
        is_tried = position_embeddings is not None and all(
            each.dim() == 3 and each.shape[-1] == own.head_dim and each.dtype == hidden_states.dtype
            for each in position_embeddings
        )
        is_first = own.config._attn_implementation == NAME and all(kwargs.get(name) is None for name in CACHES)
        if position_embeddings is None or not (is_tried and is_first):
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

    Copies of the module, with random projections and norms, are called with an attention function that records what it
    is given, one in evaluation and one in training.

    Args:
        own: The module.
        chooser: Has the device and dtype of the model, and decides whether a kernel computes the rotation.
    """
    names, width = set(dict(own.named_children())), getattr(own, "head_dim", None)
    if names not in (PROJECTIONS, PROJECTIONS | NORMS) or next(own.parameters(recurse=False), None) is not None:
        return None
    config = getattr(own, "config", None)
    if getattr(config, "_attn_implementation", None) != NAME or not width or width % 2:
        return None
    norms = [own.get_submodule(name) for name in names & NORMS]
    if any(parameter.shape != (width,) for norm in norms for parameter in norm.parameters()):
        return None
    if getattr(config, "clip_qkv", None) is not None:  # its limit may be larger than any value of the trial
        return None
    if not chooser.may_replace(own):
        return None
    try:
        copies = stand_ins(own, _random_children(own, names, width, chooser))
        x = chooser.rows(largest=2)
        cos, sin = (chooser.draw(1, PROBE_ROWS, width) for _ in range(2))
        with torch.no_grad(), _recorded(config) as given:
            settings, of_training = (_settings(copied, given, x, cos, sin) for copied in copies)
    except Exception as error:  # it is called in another way, and any error of a layer's own code may say so
        if is_out_of_memory(error):
            raise
        return None
    if settings is None or settings != of_training:
        return None
    return SelfAttention(own, settings, chooser.fuses_rotation(width))


def _settings(
    tried: Any, given: dict[str, Any], x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> dict[str, Any] | None:
    """Return the numbers that a layer gives to its attention function, or None if it computes or gives anything else.

    Args:
        tried: The layer.
        given: What its attention function records, see :func:`_recorded`.
        x: Hidden states, (1, seq, features).
        cos: Cosines of the angles, (1, seq, head_dim).
        sin: Sines of the angles.
    """
    expected, _ = tried(x, position_embeddings=(cos, sin), attention_mask=None)
    settings = {name: value for name, value in given["settings"].items() if value is not None}
    fitted = SelfAttention(tried, settings, fused=False)
    heads = fitted.heads(x, cos, sin)
    found = fitted.o_proj(_attended(heads[0]).flatten(2))
    pairs = zip((*heads, found), (*given["heads"], expected), strict=True)
    is_same = all(
        one.shape == other.shape and one.dtype == other.dtype and is_close(one, other, TOLERANCE)
        for one, other in pairs
    )
    is_plain = not settings.pop("dropout", 0) and all(isinstance(value, (int, float)) for value in settings.values())
    return settings if is_same and is_plain else None


def _random_children(own: Any, names: set[str], width: int, chooser: Chooser) -> dict[str, Any]:
    """Return children of a stand-in for a self-attention; its projections read and give few features."""
    children = dict[str, Any]()
    for name in sorted(names):
        if name in NORMS:
            weight = chooser.draw(width)  # of single heads only
            children[name] = partial(F.rms_norm, normalized_shape=(width,), weight=weight)
        elif name == "o_proj":
            children[name] = chooser.linear(inputs=own.o_proj.in_features)
        else:
            children[name] = chooser.linear(outputs=getattr(own, name).out_features)
    return children


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
