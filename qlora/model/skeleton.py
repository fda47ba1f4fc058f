"""A base's architecture without weights, built from an untrusted config."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.files.rope import num_positions
from qlora.lora import ScoreHead, output_head, reads_images
from qlora.model.formats import weight_format
from qlora.model.kinds import is_multimodal, multimodal_class, unsupported_kind
from qlora.model.text_only import text_only

# Config keys that count modules, and the largest number of each.
COUNT_KEYS = re.compile(r"(^|_)(layers?|experts?|blocks|depth)$")
MAX_COUNT = 10_000
CHANNELS = 3
# Largest number of parameters that an error names.
MOST_NAMED = 4
# Config keys that may name a kernel to download from the hub.
KERNEL_KEYS = ("attn_implementation", "experts_implementation")


def build_skeleton(
    files: BaseFiles, trust_remote_code: bool = False, head: ScoreHead | None = None, whole: bool = False
) -> Any:
    """Build a base's architecture without weights, on the meta device.

    Args:
        files: The base's files; only config.json is read.
        trust_remote_code: Run code that comes with the model.
        head: Head that scores documents; None for the causal language model.
        whole: Whether to build the other parts of a multimodal model too.

    Returns:
        The model; of a multimodal one the text part, in the class that config.json names.

    Raises:
        ModelError: The weights' format is not supported, the base is no decoder-only model, its head is more than a
            linear layer, transformers does not know the architecture or has no class of it with such a head, it needs
            code that may not be run, or its sizes are impossible.
    """
    from transformers import AutoModelForCausalLM

    weight_format(files)
    config = read_config(files, trust_remote_code)
    if head is None:
        _check_kind(files, config)
    try:
        if head is not None:
            if of_images(files.config):
                return _build_image_scorer(files, config, head)
            return _build_scorer(files, config, head, trust_remote_code, whole)
        multimodal = multimodal_class(config)
        with torch.device("meta"):
            if multimodal is not None:
                return (multimodal if whole else text_only(multimodal))._from_config(config)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        _check_head(files, model)
        return model
    except ModelError:
        raise
    except Exception as error:  # a wrong value can make an architecture raise anything
        raise _unbuildable(files, error, trust_remote_code) from error


def _check_head(files: BaseFiles, model: Any) -> None:
    """Check that a model is its base and its output head alone, from which losses compute logits or scores.

    Raises:
        ModelError: It has other parameters.
    """
    parts = (model.base_model, output_head(model))
    known = {id(each) for part in parts if part is not None for each in part.parameters()}
    others = [name for name, each in model.named_parameters() if id(each) not in known]
    if others:
        more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
        raise ModelError(
            f"{files.name}: {type(model).__name__} has parameters outside its base and output head "
            f"({', '.join(others[:MOST_NAMED])}{more}), which the loss would leave out; use a base of another "
            "architecture, such as Llama, Mistral, Qwen or Gemma."
        )


def of_images(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is of an architecture that classifies images and predicts no tokens."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    name = config.get("model_type")
    if name not in CONFIG_MAPPING:
        return False
    kind = CONFIG_MAPPING[name]
    return kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING


def _build_image_scorer(files: BaseFiles, config: Any, head: ScoreHead) -> Any:
    """Build the class of an architecture that classifies images with a linear head on pooled features.

    Raises:
        ModelError: Its head is another module, it has batch norms, or it takes other inputs than RGB images.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification

    kinds = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds  # DeiT has others with a teacher's head
    config.update(head.config() | {"architectures": [kind.__name__]})
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    layer = output_head(model)
    is_linear = isinstance(layer, torch.nn.Linear) and layer.out_features == head.num_labels
    if not is_linear or not reads_images(model):
        raise ModelError(
            f"{files.name}: {kind.__name__} has no linear head on the features of an image under a known name, which "
            "is not supported; use a base of another architecture, such as ViT, DeiT, DINOv2 or Swin."
        )
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ModelError(
            f"{files.name} has batch norms, whose statistics would change while adapters are trained; use a base with "
            "layer norms, such as ViT."
        )
    if getattr(config, "num_channels", CHANNELS) != CHANNELS:
        raise ModelError(f"{files.name} reads images of {config.num_channels} channels; only RGB is supported.")
    return model


def _extended(files: BaseFiles, config: Any) -> Any:
    """Return a config with its context extended, as its class reads it from config.json.

    Raises:
        ModelError: The architecture has no rotary embeddings.
    """
    if not getattr(config.get_text_config(), "rope_parameters", None):
        raise ModelError(
            f"{files.name}: {config.model_type} has no rotary embeddings that can be scaled; omit model.rope_scaling."
        )
    return type(config).from_dict(files.config)


def read_config(files: BaseFiles, trust_remote_code: bool = False) -> Any:
    """Return a base's config, after checking that it is that of a decoder-only model, or of images.

    Args:
        files: The base's files; only config.json is read.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ModelError: It is not, or transformers can't read it.
    """
    from transformers import AutoConfig

    _check_config(files)
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong value can make an architecture raise anything
        raise _unbuildable(files, error, trust_remote_code) from error
    if not of_images(files.config):
        _check_kind(files, config)
    return config if files.rope_scaling is None else _extended(files, config)


def _check_kind(files: BaseFiles, config: Any) -> None:
    """Check that a config is that of a decoder-only model.

    Raises:
        ModelError: It is not.
    """
    kind = unsupported_kind(config)
    if kind is not None:
        raise ModelError(
            f"{files.name} is {kind} ({config.model_type}), but only decoder-only models are supported; set model.base "
            "to one, such as Llama, Mistral, Qwen or Gemma."
        )


def positions_of(files: BaseFiles, config: Any) -> int | None:
    """Return the number of positions that a base supports; None if it does not say.

    Args:
        files: The base's files; only config.json is read.
        config: What transformers makes of it, with the defaults of its class.
    """
    return num_positions(files.config) or getattr(config.get_text_config(), "max_position_embeddings", None)


def _unbuildable(files: BaseFiles, error: Exception, trust_remote_code: bool) -> ModelError:
    reason = reason_for_users(error, trust_remote_code)
    return ModelError(f"{files.name}: the architecture can't be built: {reason}")


def _build_scorer(files: BaseFiles, config: Any, head: ScoreHead, trust_remote_code: bool, whole: bool) -> Any:
    """Build the class of an architecture that scores documents with a linear head of its own.

    Raises:
        ModelError: Transformers has no such class, its head is another one, or it has more parameters.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

    auto_class = AutoModelForSequenceClassification.__name__
    has_own_code = trust_remote_code and auto_class in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not has_own_code:
        raise ModelError(
            f"{files.name}: transformers has no class of {config.model_type} that scores documents ({auto_class}), "
            "which a reward model or a classification head needs; use a base of another architecture, such as Llama, "
            "Mistral, Qwen or Gemma."
        )
    config.update(head.config())
    with torch.device("meta"):
        if is_multimodal(config) and not (has_own_code or whole):
            model = text_only(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])._from_config(config)
        else:
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    layer = output_head(model)
    if not isinstance(layer, torch.nn.Linear) or layer.bias is not None or layer.out_features != head.num_labels:
        raise ModelError(
            f"{files.name}: {type(model).__name__} scores documents by another module than a linear layer named score "
            "without a bias, which is not supported; use a base of another architecture, such as Llama, Mistral, Qwen "
            "or Gemma."
        )
    _check_head(files, model)
    return model


def reason_for_users(error: Exception, trust_remote_code: bool) -> str:
    """Return the message of an error of transformers; if it asks to run code, name the setting that allows it."""
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return (
            "it comes with code of its own, which would run with your permissions; read it, and set "
            "model.trust_remote_code: true (--trust-remote-code) if you trust it"
        )
    return str(error) or type(error).__name__


def _check_config(files: BaseFiles) -> None:
    """Check that a config names no code from the hub, and no more modules than any model has.

    Each module takes memory by itself, even on the meta device, where weights take none.
    """
    for key, value in _walk(files.config):
        if key.endswith(KERNEL_KEYS) and isinstance(value, str) and "/" in value:
            raise ModelError(f"{files.name}: config.json asks for code from the hub, {key}: {value!r:.80}; remove it.")
        if COUNT_KEYS.search(key) and isinstance(value, int | float) and value > MAX_COUNT:
            raise ModelError(
                f"{files.name}: config.json asks for {key}: {value}, but no model has over {MAX_COUNT}; correct it."
            )


def _walk(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values, including those of nested sections."""
    for key, value in values.items():
        yield key, value
        if isinstance(value, dict):
            yield from _walk(value)
