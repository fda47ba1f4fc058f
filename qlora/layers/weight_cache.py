"""Dequantized weights that are kept where memory is free."""

from typing import Any

from qlora.lora import lora_experts
from qlora.nf4 import NF4Experts, NF4Linear


def cache_weights(model: Any, num_bytes: float) -> int:
    """Keep the dequantized weights of as many layers as fit, in the model's order; the results are the same.

    Args:
        model: A model with `NF4Linear`s and `NF4Experts`.
        num_bytes: Number of bytes that may be taken.

    Returns:
        The number of weights that are kept; the weights of all experts of a projection count as one.
    """
    num_cached = 0
    # On a GPU, adapted experts are made from the 4-bit codes, which are fewer bytes than a cached weight.
    uncached = {layer.base for _, layer in lora_experts(model)} if model.device.type == "cuda" else set()
    for layer in (module for module in model.modules() if isinstance(module, NF4Linear | NF4Experts)):
        if layer in uncached:
            continue
        num_bytes -= layer.numel * model.dtype.itemsize
        if num_bytes < 0:
            break
        layer.cache_weight(model.dtype)
        num_cached += 1
    return num_cached
