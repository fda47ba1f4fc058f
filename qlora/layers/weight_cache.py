"""Dequantized weights that are kept where memory is free."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qlora.layers.pack_linears import PackedLinear, pack_linears
from qlora.lora import lora_experts
from qlora.nf4 import NF4Experts, NF4Linear

QuantizedLayer = NF4Linear | NF4Experts


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
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer) and module not in uncached]
    return sum(1 for _ in _cache(model, layers, num_bytes))


@contextmanager
def temporarily_cached_linears(model: Any, num_bytes: float) -> Iterator[None]:
    """Keep the dequantized weights of as many linear layers as fit until the context ends; cached ones stay cached.

    Where that is faster, they are packed, see :func:`pack_linears`. Experts are left out: a few tokens go to few of
    them, and to dequantize all takes longer.

    Args:
        model: A model with `NF4Linear`s, in evaluation mode.
        num_bytes: Number of bytes that may be taken.
    """
    with pack_linears(model, num_bytes) as remaining:
        packed = {part for each in model.modules() if isinstance(each, PackedLinear) for part in each.modules()}
        linears = [
            each
            for each in model.modules()
            if isinstance(each, NF4Linear) and not each.is_cached and each not in packed
        ]
        try:
            for _ in _cache(model, linears, remaining):
                pass
            yield
        finally:
            for linear in linears:
                linear.uncache_weight()


def _cache(model: Any, layers: Sequence[QuantizedLayer], num_bytes: float) -> Iterator[QuantizedLayer]:
    """Cache the weights of the layers that fit, one after the other, and yield these."""
    for layer in layers:
        needed = layer.numel * model.dtype.itemsize
        # What is not in memory all the time is placed elsewhere because memory is short.
        if layer.before_read is None and needed <= num_bytes:
            num_bytes -= needed
            layer.cache_weight(model.dtype)
            yield layer
