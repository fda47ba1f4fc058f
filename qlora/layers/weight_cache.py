"""Dequantized weights that are kept where memory is free."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora.nf4 import NF4Linear


def cache_weights(model: Any, num_bytes: float) -> int:
    """Keep the dequantized weights of as many linear layers as fit, in the model's order; the results are the same.

    Args:
        model: A model with `NF4Linear`s.
        num_bytes: Number of bytes that may be taken.

    Returns:
        The number of weights that are kept.
    """
    return len(_cache(model, [module for module in model.modules() if isinstance(module, NF4Linear)], num_bytes))


@contextmanager
def cached_weights(model: Any, num_bytes: float) -> Iterator[None]:
    """Keep more dequantized weights for a while: those that are not cached already, as far as they fit.

    Args:
        model: A model with `NF4Linear`s.
        num_bytes: Number of bytes that may be taken.
    """
    linears = [module for module in model.modules() if isinstance(module, NF4Linear) and not module.is_cached]
    cached = _cache(model, linears, num_bytes)
    try:
        yield
    finally:
        for linear in cached:
            linear.uncache_weight()


def _cache(model: Any, linears: list[NF4Linear], num_bytes: float) -> list[NF4Linear]:
    cached = []
    for linear in linears:
        num_bytes -= linear.numel * model.dtype.itemsize
        if num_bytes < 0:
            break
        linear.cache_weight(model.dtype)
        cached.append(linear)
    return cached
