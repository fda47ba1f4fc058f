"""Tiny configs of architectures: the defaults of transformers' config classes, with sizes cut down by their names."""

import re
from typing import Any

# Sizes by the names of their keys. What is null or zero by default stays so.
NAMES: dict[int, str] = {
    1: """n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups o_groups num_dense_layers
        num_layers_per_stack n_input_layers n_output_layers resampler_depth aligner_num_add_layers moe_k
        moe_layer_interval first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts""",
    2: """num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers layers depth num_blocks decoder_num_layers num_global_layers n_recurrent_layers
        num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads num_query_groups index_n_heads
        swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k depth_decoder_layers""",
    4: """num_attention_heads num_heads n_head n_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads attention_heads linear_num_value_heads linear_num_heads
        swa_num_attention_heads num_sliding_attention_heads resampler_heads resampler_n_heads n_mamba_heads
        conf_num_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts zero_expert_num
        hc_lowrank aligner_ffn_mult mm_tokens_per_image num_query_tokens resampler_n_latents resampler_num_latents""",
    8: """mamba_n_heads mamba_num_heads index_topk keep_window_size""",
    16: """head_dim d_head dim_head d_kv kv_channels attention_head_size rotary_dim qk_nope_head_dim qk_rope_head_dim
        v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim
        mamba_headdim swa_head_dim resampler_dim_head resampler_head_dim
        mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size local_attn_chunk_length
        lsh_attn_chunk_length index_block_size
        query_pre_attn_scalar""",
    32: """sliding_window sliding_window_size attention_window_size local_attention attention_chunk_size qk_head_dim
        local_attention_window_len index_head_dim attention_head_dim""",
    64: """hidden_size d_model n_embd dim emb_dim embed_dim embedding_dim embedding_size word_embed_proj_dim
        attention_hidden_size input_embedding_size output_embedding_size classifier_proj_size q_lora_rank kv_lora_rank
        o_lora_rank out_hidden_size output_dim projection_dim text_hidden_size encoder_hidden_size decoder_hidden_size
        moe_hidden_size merged_hidden_size backbone_hidden_size projector_hidden_size projection_hidden_size
        projection_hidden_dim vision_hidden_size vision_output_dim projector_input_dim projector_output_dim
        image_token_embed_dim image_text_hidden_size pooler_output_size patch_embed_hidden_size router_hidden_size
        hidden_size_global d_rel ple_embed_dim moe_intermediate_size shape_embed_dim pronunciation_embed_dim
        adapter_out_dim adapter_in_dim
        adapter_input_size hidden_size_per_layer_input laurel_rank time_step_rank
        linear_head_dim mamba_dt_rank adapter_rank loop_gate_rank dim_model_base expert_ffn_hidden_size""",
    128: """intermediate_size ffn_dim d_ff d_inner dff dim_ff n_inner ffn_hidden_size feed_forward_size
        decoder_ffn_dim encoder_ffn_dim decoder_intermediate_size dense_intermediate_size intermediate_size_mlp
        shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim
        moe_shared_expert_intermediate_size mlp_dim mamba_d_ssm lru_width alignment_intermediate_size
        projection_intermediate_size""",
    512: """max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length
        encoder_hash_byte_group_vocab ngram_vocab_size_base""",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
# Keys with the number of layers, and those that list a kind for each, of which a tiny model has every one.
COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "no_rope_layers")
MOST_LAYERS = 12
LAYER_NUMBERS = re.compile(r".*(_idxs|_indexes|_indices|_layer_ids|_layers)$")
TOKENS = re.compile(r".*(token_id|token_index|im_(start|end|newline)_id|image_patch_id|_token_offset)$")
OWN_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MROPE_SECTION = [4, 2, 2]
# What a rule by names can't know, by the model type that has it.
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": MROPE_SECTION}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4,
        "n_recurrent_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 10,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "intermediate_size": [128] * 10,
        "activation_sparsity_pattern": [0.0] * 10,
        "num_kv_shared_layers": 5,
    },
    "glm4v_text": {"rope_parameters": ROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 32},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "ministral": {"head_dim": 16},
    "qwen2_5_vl_text": {"rope_parameters": ROPE},
    "qwen2_vl_text": {"rope_parameters": ROPE},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(config_class: Any, vocab_size: int, tokens: dict[str, int | None]) -> Any:
    """Return a config of a class with small sizes.

    Args:
        config_class: A config class of transformers.
        vocab_size: Number of tokens of the tokenizer; the model has 64 more, for images and the like.
        tokens: Ids of BOS, EOS and padding by the key's name.
    """
    return config_class(**_tiny_values(config_class(), vocab_size, tokens))


def _tiny_values(default: Any, vocab_size: int, tokens: dict[str, int | None]) -> dict[str, Any]:
    """Return the values of a config, and of those within it, that are not the default ones."""
    whole = default.to_dict()
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    given = {name: value for name, value in whole.items() if name not in parts}
    old_count = next((given[name] for name in COUNTS if isinstance(given.get(name), int)), 0)
    count = _num_layers(given, old_count)
    others = iter(range(vocab_size, vocab_size + 64))
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in OWN_TOKENS:
            values[name] = tokens[name]
        elif TOKENS.match(name) and isinstance(value, int):
            values[name] = next(others)
        elif name in COUNTS and value:
            values[name] = count
        elif "vocab_size" in name and value:
            values[name] = vocab_size + 64
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            values[name] = SIZES[name]
        elif isinstance(value, list) and old_count and len(value) == old_count:
            values[name] = [SIZES.get(name, each) for each in value[:count]]
        elif isinstance(value, list) and LAYER_NUMBERS.match(name) and all(isinstance(each, int) for each in value):
            values[name] = [each for each in value if each < count]
        elif isinstance(value, dict) and "mrope_section" in value:
            values[name] = value | {"mrope_section": MROPE_SECTION}
    if given.get("num_key_value_heads") == given.get("num_attention_heads") and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if given.get("num_key_value_heads") == 1:
        values["num_key_value_heads"] = 1
    for name, part in parts.items():
        if part is not None:
            values[name] = {"model_type": part.model_type} | _tiny_values(part, vocab_size, tokens)
    return values | EXCEPTIONS.get(default.model_type, {})


def _num_layers(values: dict[str, Any], default: int) -> int:
    """Return the number of layers that has each kind of layer, or two."""
    count = 2
    for name in KINDS:
        kinds = values.get(name)
        if isinstance(kinds, list) and len(kinds) == default:
            count = max([count, *(kinds.index(kind) + 1 for kind in set(kinds))])
    return min(count, MOST_LAYERS)
