"""A longer context by scaling rotary embeddings, as keys of a config.json.

yarn: arXiv:2309.00071; linear: position interpolation, arXiv:2306.15595; dynamic: NTK-aware scaling that depends on the
length of the sequence.
"""

import math
from collections.abc import Mapping
from typing import Any

from qlora.errors import ModelError

ROPE_SCALINGS = ("yarn", "linear", "dynamic")
# The part of a config with a scaling for each kind of layer that is scaled: the others see a window.
GLOBAL_LAYERS = "full_attention"
# Types that scale nothing: mrope, as Qwen2-VL's config calls it, has a position for each dimension of an image.
UNSCALED = ("default", "mrope")


def extend_context(config: Mapping[str, Any], scaling: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return a config.json whose model takes longer sequences.

    Args:
        config: The base's config.json.
        scaling: `type`, one of :data:`ROPE_SCALINGS`, and `factor`, by how much longer sequences may be.
        base: Name of the base, for messages.

    Raises:
        ModelError: The type is unknown, the factor is not above 1, or the base has no positions or a scaling already.
    """
    kind, factor = scaling.get("type"), scaling.get("factor")
    if kind not in ROPE_SCALINGS or not isinstance(factor, int | float) or not 1 < factor < math.inf:
        raise ModelError(
            f"rope_scaling: {dict(scaling)!r:.80} should be a type ({', '.join(ROPE_SCALINGS)}) and a factor above 1."
        )
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": extend_context(config["text_config"], scaling, base)}
    positions = config.get("max_position_embeddings")
    if type(positions) is not int:
        raise ModelError(f"{base}: model.rope_scaling needs max_position_embeddings in config.json, which has none.")
    own = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(own, dict):
        raise ModelError(
            f"{base} has rope_scaling: {own!r:.80} in its config.json, which is not an object; correct it."
        )
    current = of_global_layers(own)
    earlier = current.get("rope_type", current.get("type", "default"))
    if earlier not in UNSCALED:
        raise ModelError(
            f"{base} has rotary embeddings of the type {earlier} in its config.json already; omit model.rope_scaling."
        )
    extended = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        extended["original_max_position_embeddings"] = positions
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    result = {**config, key: update_global_layers(own, extended)}
    if kind != "dynamic":  # which scales from there on
        result["max_position_embeddings"] = int(positions * factor)
    return result


def num_positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that a config.json supports; None if it does not say."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    positions = text.get("max_position_embeddings")
    if type(positions) is not int:
        return None
    own = text.get("rope_parameters") or text.get("rope_scaling") or {}
    own = of_global_layers(own) if isinstance(own, dict) else {}
    return int(positions * own["factor"]) if own.get("rope_type") == "dynamic" and "factor" in own else positions


def of_global_layers(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters; those of the global layers where each kind of layer has its own."""
    by_layer = rope.get(GLOBAL_LAYERS)
    return dict(by_layer if isinstance(by_layer, dict) else rope)


def update_global_layers(rope: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters with other values for the global layers, or for all where they share them.

    The old key `type` is left out where the values have a `rope_type`.
    """
    updated = {**of_global_layers(rope), **values}
    if "rope_type" in values:
        updated.pop("type", None)
    return {**rope, GLOBAL_LAYERS: updated} if isinstance(rope.get(GLOBAL_LAYERS), dict) else updated
