"""The config of a GGUF file: transformers' conversion, completed by every key of the file that has an effect.

transformers ignores keys that it has no entry for. Here each key of a file's architecture is one that a config holds,
one that is checked, or one without effect; a file with any other is refused.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.files.rope import of_global_layers, update_global_layers

# Keys of all architectures, without their prefix, with those of transformers' configs.
COMMON_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
GEMMA_KEYS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# llama.cpp's architectures: their model type in transformers, and their own keys.
ARCHITECTURES: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen2moe": ("qwen2_moe", EXPERT_KEYS),
    "qwen3moe": ("qwen3_moe", EXPERT_KEYS),
    "gemma2": ("gemma2", GEMMA_KEYS),
    "gemma3": ("gemma3_text", GEMMA_KEYS),
}
# Keys that llama.cpp has the same default for as transformers, or that the tensors' shapes show to be wrong.
OPTIONAL = {
    "vocab_size",
    "attention.head_count_kv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
}
WITHOUT_EFFECT = {"rope.scaling.finetuned", "tensor_data_layout"}
# Kinds of rotary scaling that transformers has under the same name.
ROPE_SCALINGS = ("linear", "yarn")
# Llama 3's divisors of rotary frequencies are a tensor in GGUF; its config has the values that they follow from.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Layers of the Gemma models whose attention llama.cpp scales by the width per head instead of the heads' size: 27B.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def check_architecture(fields: Mapping[str, Any], path: Path) -> str:
    """Return a file's architecture.

    Args:
        fields: Its metadata.
        path: The file, for messages.

    Raises:
        ModelError: It is not one of :data:`ARCHITECTURES`, or the file holds an adapter.
    """
    architecture = fields.get("general.architecture")
    if fields.get("general.type") == "adapter":
        raise ModelError(
            f"{path} is an adapter for llama.cpp, without its base. Use the same adapter in PEFT's format: the run, or "
            "its folder adapter/."
        )
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path} is a GGUF file of the architecture {architecture}; those supported are "
            f"{', '.join(ARCHITECTURES)}. Use the same model in 16-bit safetensors."
        )
    return str(architecture)


def complete_config(config: Any, fields: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> None:
    """Set everything that a file says in the config that transformers made of it.

    Args:
        config: The config.
        fields: The file's metadata.
        tensors: Places of its tensors, by name.
        path: The file.

    Raises:
        ModelError: The file lacks a key, or has one or a value that the config has no place for.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = check_architecture(fields, path)
    model_type, keys = ARCHITECTURES[architecture]
    if config.model_type != model_type:
        raise ModelError(f"{path}: transformers reads {architecture} as {config.model_type}; use safetensors.")
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items() if "." in key}
    own = {key: value for key, value in own.items() if f"{architecture}.{key}" in fields}
    keys = COMMON_KEYS | keys
    if missing := [key for key in keys if key not in own and key not in OPTIONAL and hasattr(config, keys[key])]:
        raise ModelError(f"{path} lacks {architecture}.{missing[0]}; download it again, or use safetensors.")
    config.num_key_value_heads = int(own["attention.head_count"])
    for key in own.keys() & keys.keys():
        setattr(config, keys[key], own[key])
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    config.dtype = _dtype(tensors)
    config.head_dim = int(own.get("attention.key_length", config.hidden_size // config.num_attention_heads))
    if model_type == "llama":
        config.attention_bias = "blk.0.attn_output.bias" in tensors
        config.mlp_bias = "blk.0.ffn_up.bias" in tensors
    if architecture in GEMMA_27B_LAYERS:
        is_27b = config.num_hidden_layers == GEMMA_27B_LAYERS[architecture]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    of_rope = _set_rope(config, own, path)
    if ROPE_FACTORS in tensors:
        config.rope_parameters = {**config.rope_parameters, **_llama3_rope(config, tensors[ROPE_FACTORS], path)}
    required = {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "attention.sliding_window_pattern": getattr(config, "_sliding_window_pattern", None),
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    for key, value in own.items():
        if key in required and _is_close(value, required[key]):
            continue
        if key not in {*keys, "attention.key_length", *of_rope, *WITHOUT_EFFECT}:
            raise ModelError(
                f"{path} has {architecture}.{key}: {value!r:.80}, which has no place in transformers' config; use the "
                "same model in 16-bit safetensors."
            )


def _is_close(value: Any, required: Any) -> bool:
    return required is not None and isinstance(value, int | float) and math.isclose(value, required, rel_tol=1e-5)


def _dtype(tensors: Mapping[str, Any]) -> str:
    """Return the dtype of a file's matrices; float16, as GGUF's scales are, if they are quantized or differ."""
    from gguf import GGMLQuantizationType

    kinds = {GGMLQuantizationType(entry["kind"]).name for entry in tensors.values() if len(entry["shape"]) > 1}
    return {"F32": "float32", "BF16": "bfloat16"}.get(kinds.pop(), "float16") if len(kinds) == 1 else "float16"


def _set_rope(config: Any, own: Mapping[str, Any], path: Path) -> set[str]:
    """Set a config's rotary embeddings, and return the keys that they are in.

    Raises:
        ModelError: The file's scaling has no counterpart, or no factor.
    """
    used, rope = {"rope.freq_base", "rope.scaling.type"}, {}
    if "rope.freq_base" in own:
        rope["rope_theta"] = float(own["rope.freq_base"])
    scaling = own.get("rope.scaling.type", "none")
    if scaling in ROPE_SCALINGS:
        factor = own.get("rope.scaling.factor")
        if factor is None:
            raise ModelError(f"{path} has rotary scaling of the type {scaling} without a factor; use safetensors.")
        rope |= {"rope_type": scaling, "factor": float(factor)}
        used |= {"rope.scaling.factor", "rope.scaling.original_context_length"}
        if "rope.scaling.original_context_length" in own:
            rope["original_max_position_embeddings"] = int(own["rope.scaling.original_context_length"])
    elif scaling != "none":
        raise ModelError(f"{path} has rotary scaling of the type {scaling}, which is not supported; use safetensors.")
    config.rope_parameters = update_global_layers(config.rope_parameters, rope)
    local = config.rope_parameters.get("sliding_attention")
    if local is not None and "rope.freq_base_swa" in own:
        used.add("rope.freq_base_swa")
        local["rope_theta"] = float(own["rope.freq_base_swa"])
    return used


def _llama3_rope(config: Any, place: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of Llama 3's config that give a file's divisors of rotary frequencies.

    Raises:
        ModelError: They follow from other values.
    """
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = np.fromfile(path, dtype=np.float32, count=place["bytes"] // 4, offset=place["start"])
    rope = {"rope_type": "llama3", "factor": float(found.max()), **LLAMA3_ROPE}
    plain, config.rope_parameters = config.rope_parameters, {**config.rope_parameters, **rope}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(found)
    frequencies = 1.0 / of_global_layers(plain)["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if size != config.head_dim or not np.allclose((frequencies / scaled).numpy(), found, rtol=1e-4):
        raise ModelError(f"{path} has rotary factors other than Llama 3's, which are not supported; use safetensors.")
    return rope
