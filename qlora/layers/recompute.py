"""Levels of activation checkpointing: how much of the forward is computed again in the backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

from qlora.errors import ModelError
from qlora.layers.attention import NAME as BY_DOCUMENTS
from qlora.layers.offload import HostStore
from qlora.layers.rebuild import GatedMLP
from qlora.layers.recompute_mlp import recompute_mlp, tile_mlp
from qlora.layers.region import recomputed

# Device types with memory of their own.
OFFLOADED_FROM = ("cuda",)
# Attention implementations that call torch's kernels, which are known by name.
ATTENTION_BY_TORCH = ("sdpa", BY_DOCUMENTS)


def recompute_levels(model: Any) -> list[str]:
    """Return the levels of recomputation that a model supports on its device, the fastest first.

    | level | saved per layer between forward and backward |
    |---|---|
    | `none` | everything except norms and gated products |
    | `mlp` | as `none`, without the outputs of the gate and up projections |
    | `attention` | the layer's input and its attention's output |
    | `full` | the layer's input |
    | `offload` | nothing; the layer's input is on the host, except for the last layer |
    | `offload+tiled` | as `offload`, and the MLP runs over part of the tokens at a time |

    A layer that is computed again keeps its dequantized weights for the backward that follows, but not with `offload`.

    Args:
        model: A model of transformers, on its device. Call :func:`qlora.layers.rebuild_activations` and
            :func:`qlora.layers.use_document_attention` first, if they are used.
    """
    layers = checkpointed_layers(model)
    if not layers:
        return ["none"]
    gated = all(any(isinstance(module, GatedMLP) for module in layer.modules()) for layer in layers)
    fused = model.config._attn_implementation in ATTENTION_BY_TORCH
    apart = model.device.type in OFFLOADED_FROM
    levels = {
        "none": True,
        "mlp": gated,
        "attention": fused,
        "full": True,
        "offload": apart,
        "offload+tiled": apart and gated,
    }
    return [level for level, can in levels.items() if can]


def apply_recompute(model: Any, level: str) -> str:
    """Set a model's level of recomputation, which applies in training mode.

    Args:
        model: A model of transformers.
        level: One of :func:`recompute_levels`; `auto` is `full` if the model supports it, else `none`.

    Returns:
        The level in use.

    Raises:
        ModelError: The model does not support the level.
    """
    levels = recompute_levels(model)
    if level == "auto":
        level = "full" if "full" in levels else "none"
    if level not in levels:
        raise ModelError(
            f"{type(model).__name__} does not support model.recompute={level}: {_unsupported_reason(model, level)}. "
            f"Set model.recompute={' or '.join(levels)}."
        )
    layers = checkpointed_layers(model)
    store = HostStore(model.device) if level.startswith("offload") else None
    for layer in layers:
        # Not by transformers' own switch, which also makes the output of the frozen embeddings require a gradient:
        # only reentrant checkpointing needs that, and it costs the first layer's input gradients.
        layer.gradient_checkpointing = level not in ("none", "mlp")
        region = partial(recomputed, keep_attention=level == "attention", keep_weights=store is None)
        # The last layer's input stays: the backward needs it as soon as it would be on the host.
        layer._gradient_checkpointing_func = (
            region if store is None else partial(_offloaded, region, store, layer is layers[-1])
        )
    for mlp in (module for module in model.modules() if isinstance(module, GatedMLP)):
        mlp.run = {"mlp": recompute_mlp, "offload+tiled": tile_mlp}.get(level)
    return level


def checkpointed_layers(model: Any) -> list[Any]:
    """Return the layers of a model that support activation checkpointing, in its order; stages that consist of such
    layers are left out.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # The innermost ones: Swin's stages, which are such layers too, consist of others.
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [
        layer
        for layer in found
        if not any(isinstance(inner, GradientCheckpointingLayer) for inner in layer.modules() if inner is not layer)
    ]


def _unsupported_reason(model: Any, level: str) -> str:
    if not checkpointed_layers(model):
        return "it has no layers that support checkpointing"
    if level == "attention":
        return f"only the output of torch's own attention can be saved, and it uses {model.config._attn_implementation}"
    if level.startswith("offload") and model.device.type not in OFFLOADED_FROM:
        return f"it is on a {model.device.type}, which shares the host's memory"
    if level in ("mlp", "offload+tiled"):
        return "not all its layers have an MLP of separate gate, up and down projections"
    return "there is no such level"


def _offloaded(
    region: Callable[..., Any], store: HostStore, is_last: bool, function: Callable[..., Any], *inputs: Any
) -> Any:
    """Call a layer whose hidden states, its first input, are saved on the host."""
    with store.hooks(inputs[0], stays=is_last):
        return region(function, *inputs)
