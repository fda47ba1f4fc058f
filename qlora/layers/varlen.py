"""Where torch's `varlen_attn`, attention within the documents of a packed sequence on GPUs, can be used.

It is FlashAttention 2, which raises in a forward or a backward for anything else. The limits are those of torch's
sources, `aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp` and `sdp_utils.cpp`.
"""

from typing import Any

import torch

LEAST_CAPABILITY = (8, 0)
MOST_FEATURES, FEATURES_MULTIPLE = 256, 8
# Head dims whose backward is for some GPUs only.
PARTLY_SUPPORTED, SUPPORTED_ON = range(193, 225), ((8, 0), (9, 0))


def varlen_unusable_reason(
    dtype: torch.dtype, capability: tuple[int, int], head_dim: int, value_dim: int
) -> str | None:
    """Return why `varlen_attn` can't train attention layers, or None if it can.

    Args:
        dtype: Dtype of queries, keys and values.
        capability: Compute capability of the GPU.
        head_dim: Features of a query and of a key.
        value_dim: Features of a value.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"varlen_attn is for 16 bits, not {str(dtype).removeprefix('torch.')}"
    if capability < LEAST_CAPABILITY:
        return "varlen_attn needs compute capability {}.{}, this GPU has {}.{}".format(*LEAST_CAPABILITY, *capability)
    if head_dim != value_dim:
        return f"varlen_attn needs keys and values of one size, not of {head_dim} and {value_dim}"
    if head_dim > MOST_FEATURES or head_dim % FEATURES_MULTIPLE:
        return f"varlen_attn needs head dims to {MOST_FEATURES} in steps of {FEATURES_MULTIPLE}, not {head_dim}"
    if head_dim in PARTLY_SUPPORTED and capability not in SUPPORTED_ON:
        return f"varlen_attn can't train a head dim of {head_dim} on compute capability {capability[0]}.{capability[1]}"
    return None


def reason_for_tensors(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Return why `varlen_attn` can't attend from queries to values on their GPU, or None if it can.

    Args:
        query: (..., head_dim).
        value: (..., value_dim).
    """
    capability = torch.cuda.get_device_capability(query.device)
    return varlen_unusable_reason(query.dtype, capability, query.shape[-1], value.shape[-1])


def describe_kernel(model: Any) -> str:
    """Describe how a model's attention within documents is computed on its GPU, and why.

    Sizes are those of its attention modules, which may differ by layer, as in Gemma 4; configs name them in many ways.
    """
    capability = torch.cuda.get_device_capability(model.device)
    found = [varlen_unusable_reason(model.dtype, capability, *sizes) for sizes in _head_sizes(model)]
    reasons = ", ".join(dict.fromkeys(reason for reason in found if reason is not None))
    if not found:
        return "varlen_attn where it takes the heads' sizes"
    if not reasons:
        return "varlen_attn"
    if None in found:
        unusable = len(found) - found.count(None)
        return f"varlen_attn, in {unusable} of {len(found)} layers a document at a time: {reasons}"
    return f"a document at a time: {reasons}"


def _head_sizes(model: Any) -> list[tuple[int, int]]:
    """Return the features of a query and of a value in each causal attention module that names them."""
    sizes = []
    for module in model.modules():
        head_dim = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
        if head_dim is not None and getattr(module, "is_causal", False):
            sizes.append((head_dim, getattr(module, "v_head_dim", None) or head_dim))
    return sizes
