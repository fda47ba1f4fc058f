"""Dequantized weights that are kept where memory is free."""

from typing import Any

from qlora.nf4 import NF4Linear


def cache_weights(model: Any, num_bytes: float) -> int:
    """Keeps the dequantized weights of as many linear layers as fit, in the model's order; the results are the same.

    Args:
        model: With `NF4Linear`s.
        num_bytes: That may be taken.

    Returns:
        The number of weights that are kept.
    """
    num_cached = 0
    for linear in (module for module in model.modules() if isinstance(module, NF4Linear)):
        num_bytes -= linear.in_features * linear.out_features * model.dtype.itemsize
        if num_bytes < 0:
            break
        linear.cache_weight(model.dtype)
        num_cached += 1
    return num_cached
