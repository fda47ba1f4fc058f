"""Other trainers' names of our keys: for conversion, hints and `qlora explain`."""

# Names of axolotl, LLaMA-Factory, TRL with transformers' arguments, and unsloth, by our key.
NAMES_OF = {
    "model.base": (
        "base_model base_model_name_or_path model_name_or_path model_name model_id pretrained_model_name_or_path"
    ),
    "model.revision": "revision_of_model model_revision",
    "model.quantization": (
        "adapter load_in_4bit quantization_bit bits use_4bit_quantization use_bnb_4bit_quantization quant_type "
        "bnb_4bit_quant_type quantization_type bnb_config_kwargs"
    ),
    "model.double_quant": "bnb_4bit_use_double_quant use_bnb_nested_quant use_nested_quant double_quantization",
    "model.compute_dtype": "bf16 fp16 bfloat16 float16 torch_dtype pure_bf16 bnb_4bit_compute_dtype",
    "model.attention": (
        "flash_attention flash_attn use_flash_attn use_flash_attention_2 attn_implementation sdp_attention "
        "eager_attention flex_attention xformers_attention"
    ),
    "model.recompute": (
        "activation_checkpointing gradient_checkpointing use_gradient_checkpointing "
        "disable_gradient_checkpointing activation_offloading"
    ),
    "lora.rank": "lora_r lora_rank r init_r",
    "lora.final_rank": "target_r",
    "lora.alpha": "lora_alpha",
    "lora.rank_pattern": "peft_rank_pattern",
    "lora.alpha_pattern": "peft_alpha_pattern",
    "lora.dropout": "lora_dropout",
    "lora.targets": "lora_target lora_target_linear lora_target_modules target_modules lora_modules",
    "lora.rslora": "use_rslora peft_use_rslora",
    "lora.kind": "use_dora peft_use_dora",
    "lora.layers": "layers_to_transform peft_layers_to_transform",
    "lora.exclude": "exclude_modules",
    "lora.init": "init_lora_weights peft_init_lora_weights pissa_init use_loftq loftq_config loftq",
    "lora.start_from": "lora_model_dir adapter_name_or_path adapter_folder adapter_path",
    "lora.stack": "create_new_adapter",
    "lora.modules_to_save": "lora_modules_to_save additional_target train_embeddings embedding_trainable",
    "data.train": (
        "datasets dataset dataset_name pretraining_dataset dataset_mixture dataset_mixer train_file train_files "
        "data_path local_dataset dataset_path data_files"
    ),
    "data.eval": (
        "val_set_size val_size test_datasets eval_dataset eval_dataset_size test_split_size validation_file "
        "eval_file local_eval_dataset eval_split_size eval_on_each_dataset"
    ),
    "data.format": "format_type dataset_format",
    "data.columns": "field_messages message_property_mappings dataset_text_field",
    "data.max_rows": "max_samples max_train_samples",
    "data.deduplicate": "dataset_exact_deduplication exact_deduplication",
    "data.chat_template": "template chat_template_path chat_template_jinja chat_template_format",
    "data.new_tokens": (
        "tokens added_tokens new_special_tokens add_special_tokens add_tokens trainable_token_indices "
        "fix_untrained_tokens"
    ),
    "data.special_tokens": "eos_token pad_token",
    "data.loss_on": (
        "train_on_inputs train_on_prompt train_on_source mask_history roles_to_train assistant_only_loss "
        "completion_only_loss completions_only train_on_completions train_on_responses_only"
    ),
    "data.max_seq_len": "sequence_len cutoff_len max_length max_seq_length model_max_length",
    "data.overlong": "excess_length_strategy truncation_mode",
    "data.packing": "sample_packing neat_packing",
    "data.cache_dir": "dataset_prepared_path tokenized_path",
    "train.objective": "rl stage pref_loss loss_type dpo_loss_type",
    "train.reward": "center_rewards_coefficient",
    "train.preference": (
        "beta rl_beta pref_beta rpo_alpha pref_ftx dpo_label_smoothing dpo_norm_loss orpo_alpha cpo_alpha simpo_gamma "
        "kto_desirable_weight kto_undesirable_weight kto_chosen_weight kto_rejected_weight desirable_weight "
        "undesirable_weight"
    ),
    "train.epochs": "num_epochs num_train_epochs",
    "train.micro_batch_size": "per_device_train_batch_size per_gpu_train_batch_size batch_size train_batch_size",
    "train.gradient_accumulation_steps": "grad_accum accumulation_steps",
    "train.learning_rate": "lr",
    "train.lr_scheduler": "lr_scheduler_type",
    "train.min_learning_rate": "cosine_min_lr_ratio lr_scheduler_kwargs min_lr",
    "train.learning_rates": (
        "loraplus_lr_ratio loraplus_lr_embedding embedding_learning_rate embedding_lr embedding_lr_scale"
    ),
    "train.restarts": "num_cycles",
    "train.optimizer": "optim",
    "train.betas": "adam_beta1 adam_beta2",
    "train.deterministic": "full_determinism",
    "train.seed": "random_state random_seed",
    "train.neftune_alpha": "neftune_noise_alpha noisy_embedding_alpha",
    "train.token_loss": "use_dft use_dft_loss",
    "train.label_smoothing": "label_smoothing_factor",
    "train.log_every": "logging_steps",
    "train.eval_every": "eval_steps evals_per_epoch eval_strategy evaluation_strategy",
    "train.save_every": "save_steps saves_per_epoch save_strategy",
    "train.early_stopping": "early_stopping_patience early_stopping_steps",
    "train.keep_best": "load_best_model_at_end metric_for_best_model",
    "eval.metrics": "predict_with_generate do_causal_lm_eval eval_causal_lm_metrics",
    "eval.max_new_tokens": "eval_max_new_tokens eval_table_max_new_tokens",
    "train.keep_checkpoints": "save_total_limit",
    "train.trackers": "report_to use_wandb use_tensorboard use_mlflow use_comet enable_wandb enable_tensorboard",
}
NAMES = {name: key for key, names in NAMES_OF.items() for name in names.split()}
NAMES["resume_from_checkpoint"] = "the option --resume auto|PATH"
# Keys that have the same name in both.
SAME_NAMES = {
    name: f"train.{name}"
    for name in ("micro_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "seed",
                 "warmup_steps", "warmup_ratio", "output_dir")
} | {"trust_remote_code": "model.trust_remote_code", "max_seq_len": "data.max_seq_len"}  # fmt: skip
