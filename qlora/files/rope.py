"""A longer context by scaling rotary embeddings, as keys of a config.json.

yarn: arXiv:2309.00071; linear: position interpolation, arXiv:2306.15595; dynamic: NTK-aware scaling that depends on the
length of the sequence.
"""

from collections.abc import Mapping
from typing import Any

from qlora.errors import ModelError

ROPE_SCALINGS = ("yarn", "linear", "dynamic")
# The part of a config with a scaling for each kind of layer that is scaled: the others see a window.
GLOBAL_LAYERS = "full_attention"


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
    if kind not in ROPE_SCALINGS or not isinstance(factor, int | float) or not factor > 1:
        raise ModelError(
            f"rope_scaling: {dict(scaling)!r:.80} should be a type ({', '.join(ROPE_SCALINGS)}) and a factor above 1."
        )
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": extend_context(config["text_config"], scaling, base)}
    positions = config.get("max_position_embeddings")
    if type(positions) is not int:
        raise ModelError(f"{base}: model.rope_scaling needs max_position_embeddings in config.json, which has none.")
    own = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_by_layer = isinstance(own.get(GLOBAL_LAYERS), dict)
    current = own[GLOBAL_LAYERS] if is_by_layer else own
    earlier = current.get("rope_type", current.get("type", "default"))
    if earlier != "default":
        raise ModelError(
            f"{base} has rotary embeddings of the type {earlier} in its config.json already; omit model.rope_scaling."
        )
    extended = {**current, "rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        extended["original_max_position_embeddings"] = positions
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    result = {**config, key: {**own, GLOBAL_LAYERS: extended} if is_by_layer else extended}
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
    own = own.get(GLOBAL_LAYERS, own) if isinstance(own, dict) else {}
    return int(positions * own["factor"]) if own.get("rope_type") == "dynamic" and "factor" in own else positions
