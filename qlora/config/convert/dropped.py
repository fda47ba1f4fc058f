"""Keys of other trainers that have no counterpart here, with the reason."""

from fnmatch import fnmatch

# Keys without a meaning here: what they set has no influence on what is learned, or is decided otherwise.
WITHOUT_MEANING = {
    "train.preference takes only options of the objective that is trained": (
        "beta rl_beta pref_* dpo_* orpo_* kto_* cpo_* simpo_* rpo_* desirable_weight undesirable_weight loss_weights "
        "label_smoothing gamma_beta_ratio center_rewards_coefficient"
    ),
    "data.max_seq_len bounds each answer with its prompt": (
        "max_prompt_length max_completion_length max_prompt_len truncate_prompt"
    ),
    "the reference's log-probabilities are computed in each step, without a second model": (
        "precompute_ref_log_probs precompute_ref_batch_size dpo_use_logits_to_keep dpo_padding_free "
        "dpo_use_liger_kernel model_adapter_name"
    ),
    "the architecture and the tokenizer are read from the base's files": (
        "model_type tokenizer_type tokenizer_use_fast tokenizer_legacy use_fast_tokenizer use_fast "
        "is_*_derived_model base_model_config processor_type base_model_ignore_patterns num_labels "
        "auto_model_class task_type padding_side tokenizer_use_mistral_common"
    ),
    "wandb and other trackers read their settings from the environment, such as WANDB_PROJECT": (
        "wandb_* mlflow_* hf_mlflow_* comet_* swanlab_* trackio_* use_otel_metrics otel_* run_name project_name "
        "tensorboard_dir logging_dir project use_swanlab tracker_project_name"
    ),
    "launch several processes with accelerate or torchrun; each has a copy of the weights": (
        "deepspeed fsdp fsdp_* fsdp_config ddp_* local_rank device_map max_memory ray_* placement_strategy "
        "use_ray resources_per_worker gpu_memory_limit lora_on_cpu dp_shard_size tensor_parallel_size "
        "context_parallel_size expert_parallel_size dp_replicate_size num_processes num_machines use_cpu no_cuda "
        "world_size nproc_per_node cpu_offload offload_folder sequence_parallel_* is_multi_gpu is_single_gpu "
        "low_cpu_mem_usage accelerator_config parallelism_config ddp heads_k_stride ring_attn_func device "
        "megatron_*"
    ),
    "data is tokenized once, by all cores, and cached": (
        "dataloader_* preprocessing_num_workers preprocessing_batch_size preprocess_shards dataset_processes "
        "dataset_num_proc overwrite_cache dataset_keep_in_memory dataset_num_workers num_proc streaming "
        "buffer_size skip_prepare_dataset dataset_kwargs remove_unused_columns push_dataset_to_hub shards "
        "shards_idx dataset_shard_num dataset_shard_idx data_shared_file_system dataset_streaming "
        "dataloader_num_workers packed_sequence_* dispatch_batches split_batches preprocess_iterable"
    ),
    "every epoch is a permutation drawn from train.seed": (
        "shuffle_merged_datasets shuffle_dataset data_seed shuffle_before_merging_datasets shuffle_seed "
        "disable_shuffling shuffle"
    ),
    "padding and packing are decided by data.packing; padding is never supervised": (
        "pad_to_sequence_len eval_sample_packing eval_packing sample_packing_* sample_pack_* group_by_length "
        "max_packed_sequence_len padding_free pad_to_multiple_of total_num_tokens packing_strategy "
        "batch_flattening pretraining_sample_concatenation pad_token ignore_pad_token_for_loss "
        "append_concat_token pretrain_multipack_* multipack_real_batches length_column_name "
        "train_sampling_strategy pad_to_max_length total_supervised_tokens"
    ),
    "fast kernels are chosen by hardware and model; qlora doctor lists them": (
        "plugins liger_* use_liger_kernel enable_liger_kernel flash_attn_* flash_optimum lora_mlp_kernel "
        "lora_qkv_kernel lora_o_kernel fused_attn_kernel cut_cross_entropy unsloth_* use_unsloth use_unsloth_gc "
        "upcast_layernorm upcast_lmhead_output use_kernels use_scattermoe experts_implementation "
        "lora_embedding_kernel gemma4_hybrid_attn_impl chunked_cross_entropy chunked_cross_entropy_num_chunks "
        "tf32 use_reentrant_gc torch_empty_cache_steps "
        "gradient_checkpointing_kwargs use_reentrant use_cache torchdistx_path jit_mode_eval bf16_full_eval "
        "fp16_full_eval moe_* quantize_moe_experts bnb_4bit_quant_storage bnb_4bit_quant_storage_dtype "
        "embeddings_skip_upcast scaling_softmax flash_attn flash_attention_2 gptq_disable_exllama optimize_model "
        "activation_checkpointing_kwargs use_v1_kernels use_dora_kernel fp8 fp8_* flex_attn_compile_kwargs "
        "llama4_linearized_experts use_kv_cache gc_steps enable_jit_checkpoint"
    ),
    "torch.compile can't follow the layers' autograd functions, whose kernels are chosen by hardware and model": (
        "compile compile_* torch_compile torch_compile_* torchdynamo"
    ),
    "the run directory always holds config, metrics, a loss curve and resumable checkpoints": (
        "plot_loss overwrite_output_dir save_only_model save_safetensors save_first_step logging_strategy "
        "logging_first_step logging_nan_inf_filter log_level log_level_replica disable_tqdm "
        "include_tokens_per_second include_num_input_tokens_seen auto_resume_from_checkpoints save_on_each_node "
        "save_strategy_at_end debug strict test_value do_train do_predict profiler_steps mem_* "
        "skip_memory_metrics print_param_status average_tokens_across_devices ignore_data_skip "
        "eval_accumulation_steps eval_on_start eval_delay disable_dropout log_entropy do_eval torchao "
        "log_on_each_node verbose verbosity save_final_model load_best_model_at_start logging_config "
        "axolotl_config_path cloud env gpus restore_callback_states_from_checkpoint is_preprocess cache_dir "
        "runtime_config peft_version auto_mapping"
    ),
    "losses should fall and scores should rise": "greater_is_better",
    "evaluation is the mean loss over held-out rows, in the training's batches, and by eval.metrics": (
        "eval_batch_size per_device_eval_batch_size per_gpu_eval_batch_size eval_table_size "
        "prediction_loss_only batch_eval_metrics max_eval_samples dpo_generate_during_eval "
        "generate_during_eval compute_accuracy "
        "eval_num_beams max_prompt_length_eval do_mmlu_eval mmlu_* do_bench_eval bench_* eval_do_concat_batches "
        "include_for_metrics metric_name eval_use_gather_object "
        "label_names"
    ),
    "use qlora merge --push-to-hub, and hf auth login for private repositories": (
        "hub_* push_* hf_use_auth_token use_auth_token hf_hub_token hf_token save_model save_method save_path "
        "save_gguf quantization_method quantization export_* merged_* model_card_tags use_hf_hub "
        "use_modelscope_hub ms_hub_token om_hub_token repo_id token"
    ),
    "generation is set by options of qlora generate and qlora chat": (
        "max_new_tokens top_k top_p temperature repetition_penalty length_penalty num_beams do_sample "
        "gen_* infer_backend infer_dtype fast_inference gpu_memory_utilization "
        "max_lora_rank vllm_* use_vllm generation_* skip_special_tokens vllm gradio_*"
    ),
    "memory is fitted before the first step; set train.micro_batch_size": "auto_find_batch_size find_batch_size",
    "initial values are computed once, from the weights or a few batches, and saved with the run": (
        "pissa_iter eva_config loftq_iter"
    ),
    "the adapter is saved for the base as it is": "pissa_convert",
    "AdamW's epsilon is 1e-8": "adam_epsilon adam_eps optim_args",
    "padding is masked by length, and answers end with the end token of their chat template": (
        "special_tokens eos_token bos_token unk_token eot_tokens train_on_eos train_on_eot "
        "additional_special_tokens resize_vocab resize_token_embeddings_to_32x shrink_embeddings use_fast_eos "
        "add_bos_token add_eos_token mean_resizing_embeddings split_special_tokens init_special_tokens"
    ),
    "answers are found by rendering the conversation, without marks": (
        "instruction_template response_template instruction_part response_part efficient_eos"
    ),
    "tool calls and reasoning are written by the chat template": "enable_thinking split_thinking reasoning_effort",
    "only text is supported": (
        "image_* video_* audio_* vision_* media_dir crop_to_patches freeze_vision_tower "
        "freeze_multi_modal_projector freeze_language_model train_mm_proj_only finetune_vision_layers "
        "finetune_language_layers finetune_attention_modules finetune_mlp_modules is_dataset_image "
        "is_dataset_audio is_embedding use_audio_in_video"
    ),
    "names of columns are given by data.columns or are detected": (
        "dataset_split dataset_train_split dataset_test_split dataset_config dataset_configs dataset_splits "
        "splits dataset_dir dataset_subset subset train_split eval_split dataset_train_name"
    ),
    "the adapters are on linear layers, without biases": (
        "lora_fan_in_fan_out fan_in_fan_out layers_pattern peft_autocast_adapter_dtype bias lora_bias "
        "peft_type inference_mode use_peft use_peft_lora peft_lora stage_type lora_task_type finetuning_type "
        "full_finetune training_type full_finetuning"
    ),
}
# Keys that would change what is learned, and that qlora can't follow.
NOT_AVAILABLE = {
    "8-bit bases are not available; NF4 takes half the memory, model.quantization: none keeps 16 bits": (
        "load_in_8bit load_in_fp8 int8"
    ),
    "bases quantized by GPTQ, AWQ and others can't be trained on; name the original model as model.base": (
        "gptq gptq_* load_4bit load_in_quantized_moe awq quantization_method_gptq hqq_* quantization_device_map"
    ),
    "this objective is not available": (
        "rl rl_* stage reward_model process_reward_model ppo_* grpo_* gkd_* loss_type reward_* trl num_generations "
        "use_eaft eaft_* dft_* use_asft_loss diffusion_* teacher_model* lmbda ebft*"
    ),
    "it changes a loss of preferences in a way that is not available": (
        "ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting dpo_use_weighting discopop_tau "
        "pref_bco_weight reference_free"
    ),
    "the reference is the model at step 0": (
        "ref_model ref_model_* sync_ref_model rl_adapter_ref_model ref_adapter_name"
    ),
    "these initial values are not available; factor B starts at zero": "peft corda_* olora_* lora_ga_config",
    "layers can't have learning rates of their own": "lr_groups layerwise_lr",
    "only adapters of low rank, with or without DoRA, are available": (
        "relora relora_* lisa_* use_galore galore_* use_badam badam_* use_apollo apollo_* freeze_trainable_* "
        "freeze_extra_* unfrozen_parameters optim_target_modules use_adam_mini use_muon pure_fp16 use_llama_pro "
        "llama_adapter lora_target_parameters target_parameters "
        "peft_layer_replication layer_replication num_layer_trainable name_module_trainable "
        "use_mod mixture_of_depths oft_* qat qat_* ia3_* prefix_* prompt_tuning_* "
        "module_dropout velora_config monteclora_config use_qalora "
        "qalora_group_size use_bdlora arrow_config kasa_config alora_invocation_tokens ensure_weight_tying"
    ),
    "shifted sparse attention is not available": "s2_attention shift_attn",
    "new tokens are named in data.new_tokens": "new_special_tokens_config added_tokens_overrides",
    "short rows are kept": "min_sample_len",
    "prompts are written by the chat template; put another system message into the rows": (
        "default_system_message default_system prompt_template tool_format"
    ),
    "a run ends early by train.early_stopping, on held-out rows": (
        "early_stopping_* loss_watchdog_threshold loss_watchdog_patience"
    ),
    "rotary embeddings and other settings of the base's config.json are used as they are": (
        "rope_theta overrides_of_model_config overrides_of_model_kwargs model_config "
        "model_init_kwargs max_position_embeddings random_init_weights tokenizer_config tokenizer_name "
        "reinit_weights train_from_scratch use_pose pose_*"
    ),
    "a longer context is set by model.rope_scaling: {type, factor}": "rope_scaling yarn_*",
    "all sources are mixed by their weights": (
        "interleave_probs mix_strategy curriculum_sampling dataset_mixer_list dataset_weights"
    ),
    "the schedules of train.lr_scheduler have no such setting": (
        "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor jagged_restart_* decay_*"
    ),
    "router losses of mixtures of experts are not added": "moe_aux_loss_coef router_aux_loss_coef output_router_logits",
}

_PATTERNS = [
    (pattern, reason, is_missing)
    for table, is_missing in ((NOT_AVAILABLE, True), (WITHOUT_MEANING, False))
    for reason, patterns in table.items()
    for pattern in patterns.split()
]


def drop_reason(name: str) -> tuple[str, bool] | None:
    """Return why another trainer's key has no counterpart, and whether it would change what is learned.

    None if the key is unknown. A full name is preferred to a pattern.
    """
    exact = [(reason, is_missing) for pattern, reason, is_missing in _PATTERNS if pattern == name]
    return next(iter(exact or [(r, m) for pattern, r, m in _PATTERNS if fnmatch(name, pattern)]), None)
