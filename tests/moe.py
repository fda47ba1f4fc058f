"""Tiny models of mixture-of-experts families of transformers, random and in their published layouts."""

from pathlib import Path
from typing import Any

import transformers

from tests.tiny import make_base

BY_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
SMALL = {"moe_intermediate_size": 36, "num_experts_per_tok": 2}
# Experts in tensors of their own or in one, of a size that no block divides; shared experts; dense first layers; biases
# and transposed weights; routers that are linear layers; scores of other kinds.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**SMALL, "shared_expert_intermediate_size": 36, "num_experts": 6}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SMALL, "num_experts": 6}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
    "deepseek_v2": ("DeepseekV2Config", {**LATENT, **SMALL, "n_routed_experts": 4, "n_shared_experts": 1}),
    "deepseek_v3": ("DeepseekV3Config", {**LATENT, **SMALL, **BY_GROUPS, "n_routed_experts": 4}),
    "glm4_moe": ("Glm4MoeConfig", {**SMALL, **BY_GROUPS, "n_routed_experts": 4, "n_shared_experts": 1}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_intermediate_size": 36, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    "minimax_m2": ("MiniMaxM2Config", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2}),
}


def make_moe(folder: Path, family: str, seed: int, **sizes: Any) -> Path:
    """Save a random model of a family, as a user would have it."""
    config_class, own = FAMILIES[family]
    return make_base(folder, seed, getattr(transformers, config_class), **{**own, **sizes})
