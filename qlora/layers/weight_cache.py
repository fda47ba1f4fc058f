"""Dequantized weights that are kept where memory is free."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qlora.lora import lora_experts
from qlora.nf4 import NF4Experts, NF4Linear

Layer = NF4Linear | NF4Experts


def cache_weights(model: Any, num_bytes: float) -> int:
    """Keep the dequantized weights of as many layers as fit, in the model's order; the results are the same.

    Args:
        model: A model with `NF4Linear`s and `NF4Experts`.
        num_bytes: Number of bytes that may be taken.

    Returns:
        The number of weights that are kept; the weights of all experts of a projection count as one.
    """
    # On a GPU, adapted experts are made from the 4-bit codes, which are fewer bytes than a cached weight.
    uncached = {layer.base for _, layer in lora_experts(model)} if model.device.type == "cuda" else set()
    layers = [module for module in model.modules() if isinstance(module, Layer) and module not in uncached]
    return len(_cache(model, layers, num_bytes))


@contextmanager
def cached_weights(model: Any, num_bytes: float) -> Iterator[None]:
    """Keep more dequantized weights for a while: those that are not cached already, as far as they fit.

    Experts are left out: a few tokens go to few of them, and to dequantize all takes longer.

    Args:
        model: A model with `NF4Linear`s.
        num_bytes: Number of bytes that may be taken.
    """
    linears = [module for module in model.modules() if isinstance(module, NF4Linear) and not module.is_cached]
    cached = _cache(model, linears, num_bytes)
    try:
        yield
    finally:
        for layer in cached:
            layer.uncache_weight()


def _cache(model: Any, layers: Sequence[Layer], num_bytes: float) -> list[Layer]:
    cached = list[Layer]()
    for layer in layers:
        if layer.before_read is not None:  # it is not in memory all the time, because memory is short
            continue
        num_bytes -= layer.numel * model.dtype.itemsize
        if num_bytes < 0:
            break
        layer.cache_weight(model.dtype)
        cached.append(layer)
    return cached
