"""How much of the forward is computed again in the backward, to save memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

from qlora.errors import ModelError
from qlora.layers.attention import NAME as BY_DOCUMENTS
from qlora.layers.offload import HostStore
from qlora.layers.rebuild import GatedMLP
from qlora.layers.recompute_mlp import recompute_mlp, tile_mlp
from qlora.layers.region import recomputed

# Types of devices whose memory is not the host's.
OFFLOADED_FROM = ("cuda",)
# What calls torch's attention, whose kernels are known by name.
ATTENTION_BY_TORCH = ("sdpa", BY_DOCUMENTS)


def recompute_levels(model: Any) -> list[str]:
    """The levels of recomputation that a model can have on its device, the cheapest in time first.

    | level | held of a layer between forward and backward |
    |---|---|
    | `none` | all but norms and gated products |
    | `mlp` | that without the outputs of the gate and up projections |
    | `attention` | its input and what its attention gives |
    | `full` | its input |
    | `offload` | nothing; its input is on the host, but for the last layer's |
    | `offload+tiled` | the same, and its MLP runs over a part of the tokens at a time |

    Args:
        model: Of transformers, on its device, after :func:`qlora.model.rebuild_activations` and
            :func:`qlora.model.use_document_attention`, if they are called.
    """
    layers = _layers(model)
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
    """Sets the level of recomputation; it works while the model is in training mode.

    Args:
        model: Of transformers.
        level: One of :func:`recompute_levels`; `auto` is `full` where it is one of them.

    Returns:
        The level in use.

    Raises:
        ModelError: The model can't have it.
    """
    levels = recompute_levels(model)
    if level == "auto":
        level = "full" if "full" in levels else "none"
    if level not in levels:
        raise ModelError(
            f"{type(model).__name__} can't have model.recompute={level}: {_why_not(model, level)}. Set "
            f"model.recompute={' or '.join(levels)}."
        )
    layers = _layers(model)
    store = HostStore(model.device) if level.startswith("offload") else None
    for layer in layers:
        # Not by transformers' own switch: that also makes the frozen embeddings' output ask for a gradient, which
        # only reentrant checkpointing needs and which costs the first layer's input gradients.
        layer.gradient_checkpointing = level not in ("none", "mlp")
        region = partial(recomputed, keep_attention=level == "attention")
        # The last layer's input would be asked for as soon as it is on the host.
        layer._gradient_checkpointing_func = (
            region if store is None else partial(_offloaded, region, store, layer is layers[-1])
        )
    for mlp in (module for module in model.modules() if isinstance(module, GatedMLP)):
        mlp.run = {"mlp": recompute_mlp, "offload+tiled": tile_mlp}.get(level)
    return level


def _layers(model: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _why_not(model: Any, level: str) -> str:
    if not _layers(model):
        return "it has no layers that can be recomputed"
    if level == "attention":
        return f"only torch's own attention can be kept, and it has {model.config._attn_implementation}"
    if level.startswith("offload") and model.device.type not in OFFLOADED_FROM:
        return f"it is on a {model.device.type}, whose memory is the host's"
    if level in ("mlp", "offload+tiled"):
        return "not all its layers have an MLP of separate gate, up and down projections"
    return "there is no such level"


def _offloaded(
    region: Callable[..., Any], store: HostStore, is_last: bool, function: Callable[..., Any], *inputs: Any
) -> Any:
    """Calls a layer, whose hidden states, its first input, are kept on the host."""
    with store.hooks(inputs[0], stays=is_last):
        return region(function, *inputs)
