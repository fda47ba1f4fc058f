"""Tiny multimodal models with random weights, in the layouts that transformers writes and that were published."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import make_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
WITHOUT_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
AXES = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 64,
}
# Ids of tokens that stand for images, below the size of the vocabulary, and in no text.
TOKENS = {"image_token_id": 1, "video_token_id": 2}
# Arguments of each family's config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "LlavaConfig",
        {
            "text_config": WITHOUT_HEAD_DIM | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_id": 1,
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral"},
            "image_token_id": 1,
        },
    ),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 16},
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_id": 1,
        },
    ),
    "gemma4": (
        "Gemma4Config",
        {
            "text_config": TEXT
            | {
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 259,
                "layer_types": ["sliding_attention", "full_attention"],
                "num_kv_shared_layers": 0,
                "sliding_window": 16,
                "global_head_dim": 16,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
            },
            "audio_config": None,
            "audio_token_id": 3,
        }
        | TOKENS,
    ),
    "smolvlm": (
        "SmolVLMConfig",
        {
            "text_config": WITHOUT_HEAD_DIM | {"model_type": "llama"},
            "vision_config": VISION,
            "scale_factor": 2,
            "image_token_id": 1,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {"text_config": WITHOUT_HEAD_DIM | AXES, "vision_config": QWEN_VISION} | TOKENS,
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": TEXT | AXES,
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        }
        | TOKENS,
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        {
            "text_config": TEXT
            | {
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
            },
            "vision_config": QWEN_VISION,
        }
        | TOKENS,
    ),
}


def make_multimodal(folder: Path, family: str, seed: int, is_published: bool = True, **text: Any) -> Path:
    """Save a random multimodal model with its tokenizer and the settings of a processor.

    Args:
        folder: Where to save it.
        family: A key of `FAMILIES`.
        seed: Seed of the weights.
        is_published: Whether tensors have the names of published files, where these differ from the modules'.
        text: Other values in the config of its text model.
    """
    config_class, arguments = FAMILIES[family]
    arguments = arguments | {"text_config": arguments["text_config"] | text}
    config = getattr(transformers, config_class)(**arguments, tie_word_embeddings=False)
    torch.manual_seed(seed)
    model = transformers.AutoModelForMultimodalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, save_original_format=is_published)
    make_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    return folder
