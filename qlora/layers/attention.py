"""Attention within packed documents, without a mask over the whole sequence.

It is registered with transformers under its own name, which :func:`use_document_attention` sets on a model.
"""

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

from qlora.kernels import causal_attention
from qlora.kernels.attention import describe_blocks, takes_blocks
from qlora.layers.sinks import (
    attend_with_sinks,
    has_sinks,
    masked_with_sinks,
    near_mask,
    sinks_unusable_reason,
    varlen_with_sinks,
)
from qlora.layers.states import ARGUMENT, takes_lengths
from qlora.layers.varlen import describe_kernel, reason_for_tensors
from qlora.lora import reads_images

NAME = "qlora_documents"
# Dropouts and arguments of attention layers that are not supported here; they are refused, never ignored.
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# Shape of an empty mask: transformers passes a mask of four dimensions on unchanged.
NO_MASK = (1, 1, 0, 0)
# Kinds of layers, by transformers' names: causal attention, a state, or neither.
KINDS = {"full_attention", "sliding_attention", "linear_attention", "conv", "hybrid", "hybrid_sliding", "mlp", "moe"}
# What a model uses otherwise, after the name of its own attention.
OVER_ALL = ", with a mask over all documents of a row"
UNSUPPORTED = ("softcap", "position_bias", "head_mask")


def use_document_attention(model: Any) -> tuple[str, str | None]:
    """Set a model to attend within packed documents, if its architecture allows it.

    Args:
        model: A model of transformers, on its device.

    Returns:
        The attention in use, and the reason if it is another one.
    """
    current = model.config._attn_implementation
    reason = _unsupported_reason(model)
    if reason is not None:
        return (current, None) if reads_images(model) else (f"{current}{OVER_ALL}", reason)
    _register()
    set_text_attention(model, NAME)
    if model.device.type == "cuda":
        kernel = describe_kernel(model)
    else:
        by_blocks = _takes_blocks(model, has_sinks(model))
        kernel = describe_blocks() if by_blocks else "a document at a time"
    return f"{current} by documents ({kernel})", None


def set_text_attention(model: Any, name: str) -> None:
    """Set the attention of a model by a name of transformers; of a multimodal one, only where text is computed."""
    config = model.config
    sections = [key for key in config.sub_configs if getattr(config, key, None) is config.get_text_config()]
    model.set_attn_implementation({"": name, **dict.fromkeys(sections, name)} if sections else name)


def mask_arguments(
    model: Any, attention_mask: torch.Tensor | None, cu_seq_lens: torch.Tensor | None, lengths: Sequence[int]
) -> dict[str, Any]:
    """Return the arguments that tell a model's layers which tokens attend to which, computed once for all layers.

    Args:
        model: A model of transformers.
        attention_mask: (batch, seq), for a padded batch.
        cu_seq_lens: (documents + 1,), int32: the start of each document in a packed sequence, and the end.
        lengths: Number of tokens of each document.
    """
    name = model.config._attn_implementation
    arguments: dict[str, Any] = {"attention_mask": attention_mask}
    if name == NAME and attention_mask is None:
        # Without a mask transformers would look for documents in the position ids, and the host would wait for the
        # device.
        arguments["attention_mask"] = torch.empty(NO_MASK, device=model.device)
    if cu_seq_lens is not None and (name == NAME or name.startswith("flash_attention")):
        arguments |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        arguments |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    if cu_seq_lens is not None and name == NAME:
        arguments["document_lengths"] = lengths
    if cu_seq_lens is not None and takes_lengths(model):
        arguments[ARGUMENT] = lengths
    return arguments


def document_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    document_lengths: Sequence[int] = (),
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each document.

    Args:
        module: The attention layer.
        query: (1, heads, seq, head_dim); (batch, …) with one document per row.
        key: (1, kv_heads, seq, head_dim).
        value: (1, kv_heads, seq, head_dim).
        attention_mask: Mask of a padded batch or of generation, which transformers' own function then computes.
        dropout: Dropout on attention weights; only 0 is supported.
        scaling: Factor on the scores.
        sliding_window: Number of tokens that each token sees, itself included.
        cu_seq_lens_q: (documents + 1,), int32, see :func:`mask_arguments`.
        max_length_q: Number of tokens of the longest document.
        document_lengths: Number of tokens of each document, on the host.
        s_aux: (heads,): sinks, see :mod:`qlora.layers.sinks`.
        kwargs: Further arguments of the layer; unsupported ones are refused.

    Returns:
        (1, seq, heads, head_dim), and None for the weights.
    """
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None] + ["dropout"] * bool(dropout)
    if asked:
        raise NotImplementedError(f"attention by documents has no {', '.join(asked)}; set data.packing: false")
    if attention_mask is not None and attention_mask.shape == NO_MASK:
        attention_mask = None
    lengths = [query.shape[2]] if cu_seq_lens_q is None else list(document_lengths)
    if not lengths:
        raise ValueError("packed documents need their lengths (document_lengths) in addition to cu_seq_lens_q")
    is_whole = attention_mask is None and query.shape[2] == key.shape[2]
    if is_whole and takes_blocks(lengths, query.device) and _takes_blocks(query, s_aux is not None):
        return causal_attention(query, key, value, lengths, scaling, sliding_window), None
    if cu_seq_lens_q is None:
        if is_whole:
            return _attend(query, key, value, scaling, sliding_window, s_aux).transpose(1, 2).contiguous(), None
        if s_aux is not None:
            attended = masked_with_sinks(query, key, value, s_aux, scaling, attention_mask)
            return attended.transpose(1, 2).contiguous(), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if _takes_varlen(query, value):
        return _varlen(query, key, value, scaling, sliding_window, s_aux, cu_seq_lens_q, max_length_q), None
    queries, keys, values = (torch.split(tensor, list(document_lengths), dim=2) for tensor in (query, key, value))
    documents = zip(queries, keys, values, strict=True)
    outputs = [_attend(*document, scaling, sliding_window, s_aux) for document in documents]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _takes_blocks(computed: Any, with_sinks: bool) -> bool:
    """Return whether attention of a tensor's or model's device and dtype is computed by blocks.

    On the meta device it is, because what is estimated there without CUDA's kernels is a step on a CPU. In fp32, blocks
    are not faster than torch's kernel.
    """
    return computed.device.type in ("cpu", "meta") and computed.dtype == torch.bfloat16 and not with_sinks


def _takes_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether torch's kernel for packed documents computes attention."""
    return query.is_cuda and reason_for_tensors(query, value) is None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    length = query.shape[2]
    is_fast = _takes_varlen(query, value)
    if sinks is not None and is_fast:
        starts = torch.tensor([0, length], dtype=torch.int32, device=query.device)
        rows = zip(query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([_varlen(*row, scaling, window, sinks, starts, length).transpose(1, 2) for row in rows])
    if sinks is not None and not query.is_cuda:
        return attend_with_sinks(query, key, value, sinks, scaling, window)
    is_masked = window is not None and length > window
    if query.is_cuda and (is_masked or not is_fast):
        # Of torch's kernels for GPUs, only FlashAttention takes fewer key heads; without one, all scores are in memory.
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    if sinks is not None:
        return masked_with_sinks(query, key, value, sinks, scaling, near_mask(length, window, query.device))
    if not is_masked:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    near = near_mask(length, window, query.device)
    return F.scaled_dot_product_attention(query, key, value, near, scale=scaling, enable_gqa=True)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
    cu_seq_lens: torch.Tensor,
    max_length: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    settings: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if key.shape[1] != query.shape[1] and _asks_for_groups():
        settings["enable_gqa"] = True
    # Not by an index, whose gradient is a copy into zeros.
    q, k, v = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
    if sinks is not None:
        return varlen_with_sinks(q, k, v, sinks, cu_seq_lens, max_length, **settings).unsqueeze(0)
    attended: Any = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, max_length, max_length, **settings)
    return attended.unsqueeze(0)


@cache
def _asks_for_groups() -> bool:
    """Return whether varlen_attn wants to be told of fewer key heads than query heads, as it does from torch 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


def _unsupported_reason(model: Any) -> str | None:
    """Return why a model can't attend within documents, or None if it can."""
    if reads_images(model):
        return "it attends within images"
    config = model.config.get_text_config()
    sinks = has_sinks(model)  # their architectures have no other attention of torch's own
    if model.config._attn_implementation != ("eager" if sinks else "sdpa"):
        return "model.attention selects it, or the architecture supports no other"
    if set(getattr(config, "layer_types", None) or ()) - KINDS:
        return "the architecture has layers of another kind of attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "the architecture attends in chunks"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the architecture caps attention scores"
    if any(getattr(config, name, 0.0) for name in DROPOUTS):
        return "the architecture drops attention weights"
    if not (getattr(model, "_supports_attention_backend", False) or model._can_set_attn_implementation()):
        return "the architecture does not support custom attention functions"
    if sinks:
        return sinks_unusable_reason(
            lambda q, k, v, sinks, window: _attend(q, k, v, None, window, sinks), model.device, model.dtype
        )
    return None


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        # No mask for a packed sequence: cu_seq_lens separates its documents.
        if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
            return None
        return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)

    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, mask)
