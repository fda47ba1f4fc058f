"""Kinds of models that a config describes: decoder-only ones, alone or inside a multimodal model, and others."""

from typing import Any


def is_multimodal(config: Any) -> bool:
    """Return whether a config has a section for its text model, next to those of other parts."""
    return config.get_text_config(decoder=True) is not config


def unsupported_kind(config: Any) -> str | None:
    """Return what a model is instead of a decoder-only language model; None if it is one.

    Args:
        config: A config of transformers, whose class tells more than the keys of config.json do.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model"
    if is_multimodal(config) and getattr(config.get_text_config(), "is_encoder_decoder", False):
        return "a multimodal model around an encoder-decoder model"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "an encoder-only model"
    has_class = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return None if has_class or has_code else "not a language model"


def multimodal_class(config: Any) -> Any:
    """Return the multimodal class that a config describes; None for a model of text alone.

    A config of a multimodal model may come with the weights of its text model alone, saved by the class for text.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    if not is_multimodal(config) or type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return None
    whole, text = (
        mapping.get(type(config), None) for mapping in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    )
    is_text = text is not whole and text is not None and text.__name__ in (config.architectures or ())
    return None if is_text else whole
