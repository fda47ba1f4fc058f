"""How much of the forward is computed again in the backward, to save memory."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from qlora.errors import ModelError


def apply_recompute(model: Any, level: str) -> str:
    """Sets the level of recomputation; it works while the model is in training mode.

    Args:
        model: Of transformers.
        level: `full` keeps each layer's input alone, `none` keeps all, `auto` is `full`.

    Returns:
        The level in use.

    Raises:
        ModelError: The architecture's layers can't be recomputed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if level == "auto" and not layers:
        level = "none"
    if level != "none" and not layers:
        raise ModelError(f"{type(model).__name__} has no layers that can be recomputed; set model.recompute=none.")
    # Not by transformers' own switch: that also makes the frozen embeddings' output ask for a gradient, which
    # only reentrant checkpointing needs and which costs the first layer's input gradients.
    for layer in layers:
        layer.gradient_checkpointing = level != "none"
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return "none" if level == "none" else "full"
