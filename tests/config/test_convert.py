"""Configs of other trainers become configs of ours, and every key of theirs is accounted for."""

import ast
import importlib.util
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from qlora.config import load_config
from qlora.config.convert import convert_file
from qlora.config.convert.detect import detect
from qlora.config.convert.names import NAMES, SAME_NAMES
from qlora.config.hints import keys_of
from qlora.errors import ConfigError
from tests.config.peers.key_sets import AXOLOTL, LLAMA_FACTORY, TRL, UNSLOTH, values_of

PUBLIC = {
    **{name: ("axolotl", words) for name, words in AXOLOTL.items()},
    **{name: ("LLaMA-Factory", words) for name, words in LLAMA_FACTORY.items()},
    **{name: ("TRL", words) for name, words in TRL.items()},
    **{name: ("unsloth", words) for name, words in UNSLOTH.items()},
}


AXOLOTL_BASE = {
    "base_model": "org/base", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "output_dir": "out",
    "sequence_len": 1024, "micro_batch_size": 2, "num_epochs": 2, "adapter": "qlora", "load_in_4bit": True,
}  # fmt: skip
LLAMA_FACTORY_BASE = {
    "model_name_or_path": "org/base", "stage": "sft", "finetuning_type": "lora", "dataset": "mine", "cutoff_len": 512,
    "template": "llama3", "output_dir": "out",
}  # fmt: skip
TRL_BASE = {
    "model_name_or_path": "org/base", "dataset_name": "org/chats", "use_peft": True, "load_in_4bit": True,
    "lora_target_modules": "all-linear", "num_train_epochs": 2, "output_dir": "out",
}  # fmt: skip
UNSLOTH_BASE = {
    "model_name": "org/base", "max_seq_length": 1024, "r": 8, "random_state": 3407, "dataset": "rows.jsonl",
    "use_gradient_checkpointing": "unsloth", "output_dir": "out",
}  # fmt: skip


@pytest.fixture
def convert(tmp_path):
    """Convert values or the text of a script; return the conversion and the loaded config."""

    def convert(given, name=None):
        path = tmp_path / (name or ("theirs.sh" if isinstance(given, str) else "theirs.yml"))
        path.write_text(given if isinstance(given, str) else yaml.safe_dump(given), encoding="utf-8")
        conversion = convert_file(path, str(tmp_path / "ours.jinja"))
        ours = tmp_path / "ours.yaml"
        ours.write_text(conversion.text, encoding="utf-8")
        return conversion, load_config(ours)

    return convert


def leaves(values):
    """Return names of keys, including those inside of unsloth's groups."""
    for name, value in values.items():
        if isinstance(value, dict) and name in ("model", "data", "training", "lora", "logging") or name.isupper():
            yield from leaves(value) if isinstance(value, dict) else [name.lower()]
        else:
            yield name


def test_there_are_enough_public_key_sets():
    assert len(PUBLIC) >= 40


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_key_set_converts_and_every_key_is_accounted_for(convert, name):
    trainer, words = PUBLIC[name]
    values = values_of(words)
    conversion, _ = convert(values)
    draft = conversion.draft
    assert conversion.draft.trainer == trainer
    assert draft.unknown == []
    assert set(leaves(values)) - {*draft.translated, *draft.dropped, *draft.off} == set()
    assert all(draft.dropped.values())
    for dropped in draft.dropped:
        assert dropped in conversion.text


SECRET = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("theirs", [
    {"hub_token": SECRET}, {"base_model": f"https://me:{SECRET}@host/model"}, {"wandb_project": f"hf_{SECRET}"},
    {"datasets": [{"path": f"hf_{SECRET}", "type": f"hf_{SECRET}"}]}, {"chat_template": f"hf_{SECRET}"},
    {"optimizer": f"hf_{SECRET}"}, {f"hf_{SECRET}": 1}, {"lora_target_modules": [f"hf_{SECRET}"]},
], ids=lambda theirs: next(iter(theirs))[:20])  # fmt: skip
def test_secrets_are_in_no_output(convert, theirs):
    conversion, _ = convert(AXOLOTL_BASE | theirs)
    assert SECRET not in conversion.text + "".join(conversion.draft.warnings + conversion.summary)


def test_control_characters_reach_neither_the_file_nor_the_screen(convert):
    conversion, _ = convert(AXOLOTL_BASE | {"optimizer": "a\x1b[2Jb", "odd\x1bkey\ninjected: 1": 1})
    assert "\x1b" not in conversion.text + "".join(conversion.draft.warnings + conversion.summary)
    assert "\ninjected" not in conversion.text


def test_variables_of_a_script_do_not_multiply(convert):
    bomb = "A=0123456789\n" + "".join(
        f"{new}=${old}${old}${old}${old}\n" for old, new in pairwise("ABCDEFGHIJKLMNOPQRST")
    )
    conversion, _ = convert(f"{bomb}trl sft --model_name_or_path org/b --dataset_name org/d --run_name {'$T' * 1000}")
    assert len(conversion.text) < 10_000


def get(config, key):
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize(("base", "theirs", "key", "value"), [
    (AXOLOTL_BASE, {"optimizer": "adamw_bnb_8bit"}, "train.optimizer", "adamw_8bit"),
    (AXOLOTL_BASE, {"optimizer": "paged_adamw_32bit"}, "train.optimizer", "paged_adamw_32bit"),
    (AXOLOTL_BASE, {"optimizer": "adamw_torch_fused"}, "train.optimizer", "adamw_32bit"),
    (AXOLOTL_BASE, {}, "train.optimizer", "adamw_32bit"),
    (AXOLOTL_BASE, {"lora_target_linear": True, "lora_target_modules": ["q_proj"]}, "lora.targets", "all-linear"),
    (AXOLOTL_BASE, {"lora_target_modules": ["q_proj", "v_proj"]}, "lora.targets", ["q_proj", "v_proj"]),
    (AXOLOTL_BASE, {"lora_target_modules": r"layers.[\d]+.mlp.up_proj"}, "lora.targets", r"layers.[\d]+.mlp.up_proj"),
    (AXOLOTL_BASE, {"sample_packing": True}, "data.packing", "auto"),
    (AXOLOTL_BASE, {}, "data.packing", False),
    (AXOLOTL_BASE, {"warmup_steps": 10}, "train.warmup_steps", 10),
    (AXOLOTL_BASE, {"warmup_steps": 10, "warmup_ratio": 0.1}, "train.warmup_steps", 10),
    (AXOLOTL_BASE, {"warmup_steps": 0, "warmup_ratio": 0.1}, "train.warmup_ratio", 0.1),
    (AXOLOTL_BASE, {"warmup_ratio": 0.1}, "train.warmup_ratio", 0.1),
    (AXOLOTL_BASE, {}, "train.warmup_ratio", 0.03),
    (AXOLOTL_BASE, {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
     "train.restarts", 2),
    (AXOLOTL_BASE, {"lr_scheduler": "cosine_with_restarts"}, "train.lr_scheduler", "cosine"),
    (AXOLOTL_BASE, {"lr_scheduler": "inverse_sqrt"}, "train.lr_scheduler", "inverse_sqrt"),
    (AXOLOTL_BASE, {"lr_scheduler": "warmup_stable_decay", "max_steps": 200, "learning_rate": 1e-3,
                    "lr_scheduler_kwargs": {"num_decay_steps": 20}}, "train.decay_ratio", 0.1),
    (TRL_BASE, {"learning_rate": 1e-3, "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"min_lr_ratio": 0.1}}, "train.min_learning_rate", 1e-4),
    (AXOLOTL_BASE, {"evals_per_epoch": 4}, "train.eval_every", 0.125),
    (AXOLOTL_BASE, {"saves_per_epoch": 1}, "train.save_every", 0.5),
    (AXOLOTL_BASE, {"eval_steps": 50}, "train.eval_every", 50),
    (AXOLOTL_BASE, {"eval_steps": 0.05}, "train.eval_every", 0.05),
    (AXOLOTL_BASE, {"val_set_size": 0.02}, "data.eval", 0.02),
    (AXOLOTL_BASE, {"val_set_size": 0}, "data.eval", None),
    (AXOLOTL_BASE, {"bf16": "auto"}, "model.compute_dtype", "auto"),
    (AXOLOTL_BASE, {"bf16": True}, "model.compute_dtype", "bfloat16"),
    (AXOLOTL_BASE, {"bf16": False, "fp16": True}, "model.compute_dtype", "float16"),
    (AXOLOTL_BASE, {"load_in_4bit": False, "adapter": "lora"}, "model.quantization", "none"),
    (AXOLOTL_BASE, {}, "model.quantization", "nf4"),
    (AXOLOTL_BASE, {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}, "model.double_quant", False),
    (AXOLOTL_BASE, {"peft_use_rslora": True}, "lora.rslora", True),
    (AXOLOTL_BASE, {"peft_use_dora": True}, "lora.kind", "dora"),
    (AXOLOTL_BASE, {"peft_layers_to_transform": [0, 1, 5]}, "lora.layers", [0, 1, 5]),
    (AXOLOTL_BASE, {"peft_init_lora_weights": "pissa_niter_16"}, "lora.init", "pissa"),
    (AXOLOTL_BASE, {"peft": {"loftq_config": {"loftq_bits": 4}}}, "lora.init", "reconstruct"),
    (AXOLOTL_BASE, {"peft": {"loftq_config": {"loftq_bits": 4}}, "adapter": "lora", "load_in_4bit": False},
     "model.quantization", "nf4"),
    (AXOLOTL_BASE, {"lora_model_dir": "runs/my adapter"}, "lora.start_from", "runs/my adapter"),
    (AXOLOTL_BASE, {"lora_model_dir": "runs/first"}, "lora.stack", False),
    (AXOLOTL_BASE, {"lora_model_dir": "runs/first", "peft_init_lora_weights": "pissa"}, "lora.init", "kaiming"),
    (AXOLOTL_BASE, {"train_on_inputs": True}, "data.loss_on", "all"),
    (AXOLOTL_BASE, {"lora_modules_to_save": ["embed_tokens", "lm_head"]}, "lora.modules_to_save",
     ["embed_tokens", "lm_head"]),
    (AXOLOTL_BASE, {"tokens": ["<a>", "<b>"]}, "data.new_tokens", ["<a>", "<b>"]),
    (AXOLOTL_BASE, {"batch_size": 16}, "train.gradient_accumulation_steps", 8),
    (AXOLOTL_BASE, {"gradient_checkpointing": "offload"}, "model.recompute", "offload"),
    (AXOLOTL_BASE, {"gradient_checkpointing": False}, "model.recompute", "none"),
    (AXOLOTL_BASE, {"attn_implementation": "sdpa"}, "model.attention", "sdpa"),
    (AXOLOTL_BASE, {"flash_attention": True}, "model.attention", "auto"),
    (AXOLOTL_BASE, {"wandb_project": "mine"}, "train.trackers", ["wandb"]),
    (AXOLOTL_BASE, {"learning_rate": "2e-4", "cosine_min_lr_ratio": 0.1}, "train.min_learning_rate", 2e-5),
    (AXOLOTL_BASE, {"excess_length_strategy": "raise"}, "data.overlong", "error"),
    (AXOLOTL_BASE, {}, "data.chat_template", "alpaca"),
    (AXOLOTL_BASE, {"datasets": [{"path": "r.jsonl", "type": "chat_template"}], "chat_template": "chatml"},
     "data.chat_template", "chatml"),
    (AXOLOTL_BASE, {"datasets": [{"path": "r.jsonl", "type": "completion"}]}, "data.overlong", "split"),
    (AXOLOTL_BASE, {"seed": 7}, "train.seed", 7),
    (AXOLOTL_BASE, {"loraplus_lr_ratio": 8, "loraplus_lr_embedding": 1e-6}, "train.learning_rates", {"lora_B": "8x"}),
    (AXOLOTL_BASE, {"embedding_lr_scale": 0.5, "lora_modules_to_save": ["lm_head"]}, "train.learning_rates",
     {"embeddings": "0.5x"}),
    (UNSLOTH_BASE, {"embedding_learning_rate": 1e-5, "modules_to_save": ["lm_head"]}, "train.learning_rates",
     {"embeddings": 1e-5}),
    (LLAMA_FACTORY_BASE, {"use_dora": True}, "lora.kind", "dora"),
    (LLAMA_FACTORY_BASE, {"pissa_init": True, "pissa_iter": 16, "pissa_convert": True}, "lora.init", "pissa"),
    (LLAMA_FACTORY_BASE, {"pissa_init": False, "pissa_iter": 16}, "lora.init", "kaiming"),
    (LLAMA_FACTORY_BASE, {"adapter_name_or_path": "saves/a, saves/b"}, "lora.start_from", "saves/b"),
    (LLAMA_FACTORY_BASE, {"adapter_name_or_path": "saves/a", "create_new_adapter": True}, "lora.stack", True),
    (LLAMA_FACTORY_BASE, {"create_new_adapter": True}, "lora.stack", False),
    (LLAMA_FACTORY_BASE, {"loraplus_lr_ratio": 16.0}, "train.learning_rates", {"lora_B": "16x"}),
    (LLAMA_FACTORY_BASE, {"template": "qwen3_nothink"}, "data.chat_template", "qwen3"),
    (LLAMA_FACTORY_BASE, {}, "data.chat_template", "llama3"),
    (LLAMA_FACTORY_BASE, {"lora_rank": 16}, "lora.alpha", 32),
    (LLAMA_FACTORY_BASE, {"lora_target": "q_proj,v_proj"}, "lora.targets", ["q_proj", "v_proj"]),
    (LLAMA_FACTORY_BASE, {"lora_target": "all"}, "lora.targets", "all-linear"),
    (LLAMA_FACTORY_BASE, {"quantization_bit": 4}, "model.quantization", "nf4"),
    (LLAMA_FACTORY_BASE, {"mask_history": True}, "data.loss_on", "last"),
    (LLAMA_FACTORY_BASE, {"neat_packing": True}, "data.packing", "auto"),
    (LLAMA_FACTORY_BASE, {"stage": "pt"}, "data.format", "text"),
    (LLAMA_FACTORY_BASE, {"warmup_steps": 0.1}, "train.warmup_ratio", 0.1),
    (LLAMA_FACTORY_BASE, {"new_special_tokens": "<a>,<b>"}, "data.new_tokens", ["<a>", "<b>"]),
    (LLAMA_FACTORY_BASE, {"max_samples": 100}, "data.max_rows", 100),
    (LLAMA_FACTORY_BASE, {}, "train.learning_rate", 5e-5),
    (LLAMA_FACTORY_BASE, {}, "data.overlong", "truncate"),
    (TRL_BASE, {"eval_strategy": "no"}, "train.eval_every", None),
    (TRL_BASE, {"save_strategy": "epoch"}, "train.save_every", 0.5),
    (TRL_BASE, {"lr_scheduler_type": "constant"}, "train.warmup_ratio", 0.0),
    (TRL_BASE, {}, "train.warmup_ratio", 0.0),
    (TRL_BASE, {"warmup_steps": 7}, "train.warmup_steps", 7),
    (TRL_BASE, {"learning_rate": 1e-4, "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "train.min_learning_rate", 1e-5),
    (TRL_BASE, {"assistant_only_loss": True}, "data.loss_on", "assistant"),
    (TRL_BASE, {"completion_only_loss": False}, "data.loss_on", "all"),
    (TRL_BASE, {}, "model.double_quant", False),
    (TRL_BASE, {"use_bnb_nested_quant": True}, "model.double_quant", True),
    (TRL_BASE, {"max_steps": -1}, "train.max_steps", None),
    (TRL_BASE, {"report_to": "tensorboard"}, "train.trackers", ["tensorboard"]),
    (TRL_BASE, {"report_to": "none"}, "train.trackers", []),
    (TRL_BASE, {"max_grad_norm": 0}, "train.max_grad_norm", None),
    (TRL_BASE, {"torch_dtype": "bfloat16"}, "model.compute_dtype", "bfloat16"),
    (TRL_BASE, {"adam_beta2": 0.95}, "train.betas", (0.9, 0.95)),
    (TRL_BASE, {"loss_type": "ipo", "lora_dropout": 0.1}, "lora.dropout", 0.0),
    (TRL_BASE, {"loss_type": "ipo", "lora_dropout": 0.1, "disable_dropout": False}, "lora.dropout", 0.1),
    (LLAMA_FACTORY_BASE, {"stage": "rm", "lora_dropout": 0.1}, "lora.dropout", 0.1),
    (AXOLOTL_BASE, {"rl": "dpo", "sample_packing": True}, "data.packing", False),
    (TRL_BASE, {}, "lora.dropout", 0.05),
    (TRL_BASE, {"use_dora": True}, "lora.kind", "dora"),
    (TRL_BASE, {"init_lora_weights": "gaussian"}, "lora.init", "gaussian"),
    (TRL_BASE, {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, "lora.init", "eva"),
    (TRL_BASE, {"init_lora_weights": "loftq", "loftq_config": {}}, "lora.init", "reconstruct"),
    (TRL_BASE, {"init_lora_weights": True}, "lora.init", "kaiming"),
    (TRL_BASE, {"exclude_modules": ["down_proj"]}, "lora.exclude", ["down_proj"]),
    (TRL_BASE, {"exclude_modules": r".*\.(up|down)_proj"}, "lora.exclude", [r".*\.(up|down)_proj"]),
    (TRL_BASE, {"layers_to_transform": 3}, "lora.layers", [3]),
    (TRL_BASE, {"rank_pattern": {"down_proj": 4}}, "lora.rank_pattern", {"down_proj": 4}),
    (TRL_BASE, {"init_r": 12, "target_r": 8, "r": 8}, "lora.rank", 12),
    (TRL_BASE, {"init_r": 12, "target_r": 8, "r": 8}, "lora.final_rank", 8),
    (TRL_BASE, {"init_r": 12, "target_r": 8, "init_lora_weights": "pissa"}, "lora.final_rank", None),
    (TRL_BASE, {"chat_template_path": "mine.jinja"}, "data.chat_template", "mine.jinja"),
    (UNSLOTH_BASE, {}, "model.recompute", "auto"),
    (UNSLOTH_BASE, {}, "lora.rank", 8),
    (UNSLOTH_BASE, {}, "train.seed", 3407),
    (UNSLOTH_BASE, {}, "model.quantization", "nf4"),
    (UNSLOTH_BASE, {"load_in_4bit": False}, "model.quantization", "none"),
    (UNSLOTH_BASE, {"train_on_completions": False}, "data.loss_on", "all"),
    (UNSLOTH_BASE, {"use_loftq": True}, "lora.init", "reconstruct"),
    (UNSLOTH_BASE, {"loftq_config": {"loftq_bits": 4}}, "lora.init", "kaiming"),
    (UNSLOTH_BASE, {"layers_to_transform": [0, 1]}, "lora.layers", [0, 1]),
], ids=str)  # fmt: skip
def test_a_value_becomes_ours(convert, base, theirs, key, value):
    _, config = convert(base | theirs)
    assert get(config, key) == value


@pytest.mark.parametrize(("base", "theirs"), [
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "train_on_prompt": True}),
    (AXOLOTL_BASE, {"rl": "dpo", "train_on_inputs": True}),
], ids=str)  # fmt: skip
def test_keys_on_supervised_tokens_are_dropped_where_answers_are_judged(convert, base, theirs):
    conversion, config = convert(base | theirs)
    assert (config.train.objective, config.data.loss_on) == ("dpo", "assistant")
    assert conversion.draft.dropped[[*theirs][1]] == "rows of dpo are learned whole"


def test_a_comment_names_only_keys_that_are_there(convert):
    conversion, _ = convert(AXOLOTL_BASE | {"val_set_size": 0.1, "load_best_model_at_end": True})
    assert conversion.draft.comments["train.keep_best"] == "load_best_model_at_end"


@pytest.mark.parametrize(("base", "theirs", "expected"), [
    (AXOLOTL_BASE, {"val_set_size": 0.1, "early_stopping_patience": 3},
     {"train.early_stopping": {"metric": "eval_loss", "patience": 3}}),
    (AXOLOTL_BASE, {"early_stopping_patience": 3}, {}),
    (LLAMA_FACTORY_BASE, {"val_size": 0.1, "early_stopping_steps": 4},
     {"train.early_stopping": {"metric": "eval_loss", "patience": 4}}),
    (TRL_BASE, {"loss_type": "sigmoid", "eval_dataset": "a.jsonl", "load_best_model_at_end": True,
                "metric_for_best_model": "eval_rewards/accuracies"}, {"train.keep_best": "eval_reward_accuracy"}),
    (AXOLOTL_BASE, {"val_set_size": 0.1, "load_best_model_at_end": True}, {"train.keep_best": True}),
    (AXOLOTL_BASE, {"val_set_size": 0.1, "do_causal_lm_eval": True, "eval_causal_lm_metrics": ["sacrebleu", "ter"],
                    "eval_max_new_tokens": 64, "load_best_model_at_end": True, "metric_for_best_model": "sacrebleu"},
     {"eval.metrics": ["bleu"], "eval.max_new_tokens": 64, "train.keep_best": "eval_bleu"}),
    (TRL_BASE, {"eval_dataset": {"main": "a.jsonl", "old": "b.jsonl"}, "load_best_model_at_end": True,
                "metric_for_best_model": "eval_old_loss"},
     {"data.eval": {"main": [{"path": "a.jsonl"}], "old": [{"path": "b.jsonl"}]}, "train.keep_best": "eval_old_loss"}),
    (LLAMA_FACTORY_BASE, {"eval_dataset": "one,two", "eval_on_each_dataset": True},
     {"data.eval": {"one": [{"path": "data/one.json"}], "two": [{"path": "data/two.json"}]}}),
], ids=str)  # fmt: skip
def test_what_is_evaluated_becomes_ours(convert, base, theirs, expected):
    keys = ("data.eval", "train.early_stopping", "train.keep_best", "eval.metrics", "eval.max_new_tokens")
    conversion, _ = convert(base | theirs)
    found = {key: conversion.draft.values[key] for key in keys if key in conversion.draft.values}
    if not isinstance(expected.get("data.eval"), dict):
        found.pop("data.eval", None)
    assert found == expected


@pytest.mark.parametrize(("base", "theirs", "words"), [
    (AXOLOTL_BASE, {"adapter": None, "load_in_4bit": False}, ["full fine-tuning"]),
    (AXOLOTL_BASE, {"rl": "grpo"}, ["rl: grpo", "not available", "data.format: chosen"]),
    (AXOLOTL_BASE, {"rl": "dpo", "dpo_loss_type": ["sigmoid", "hinge"]}, ["dpo_loss_type: ['sigmoid', 'hinge'] asks"]),
    (AXOLOTL_BASE, {"rl": "dpo", "dpo_use_weighting": True}, ["dpo_use_weighting", "changes a loss"]),
    (AXOLOTL_BASE, {"rl": "dpo", "dpo_label_smoothing": 0.1}, ["dpo_label_smoothing", "newer versions of TRL"]),
    (AXOLOTL_BASE, {"rl": "dpo", "rpo_alpha": 1.0}, ["sft_weight", "over all tokens"]),
    (AXOLOTL_BASE, {"rl": "orpo"}, ["learns the prompts"]),
    (AXOLOTL_BASE, {"process_reward_model": True}, ["process_reward_model", "not available"]),
    (AXOLOTL_BASE, {"load_in_4bit": False, "adapter": "lora", "load_in_8bit": True}, ["8 bits", "nf4"]),
    (AXOLOTL_BASE, {}, ["type: alpaca", "Below is an instruction", "jinja"]),
    (AXOLOTL_BASE, {"lr_scheduler": "warmup_stable_decay"}, ["train.decay_ratio", "0.2", "1 - sqrt(progress)"]),
    (AXOLOTL_BASE, {"trust_remote_code": True}, ["trust_remote_code: true runs Python code"]),
    (AXOLOTL_BASE, {"optimizer": "lion_8bit"}, ["lion_8bit", "not available"]),
    (AXOLOTL_BASE, {"lr_scheduler": "rex"}, ["rex", "cosine"]),
    (AXOLOTL_BASE, {"peft": {"loftq_config": {"loftq_bits": 2}}}, ["loftq_bits: 2", "lora.init: reconstruct"]),
    (AXOLOTL_BASE, {"lora_model_dir": "a", "peft_init_lora_weights": "pissa"}, ["lora.rank", "pissa has no effect"]),
    (LLAMA_FACTORY_BASE, {"adapter_name_or_path": "a,b"}, ["names 2 adapters", "Merge the others"]),
    (TRL_BASE, {"init_lora_weights": "corda"}, ["corda is not available"]),
    (TRL_BASE, {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}}, ["rho", "2 times the mean"]),
    (TRL_BASE, {"init_lora_weights": "orthogonal"}, ["orthonormal", "factor B is zero"]),
    (TRL_BASE, {"init_r": 40.0, "target_r": 20}, ["lora.rank", "lora.final_rank (target_r) is left out"]),
    (TRL_BASE, {"init_r": 12, "target_r": 8, "init_lora_weights": "pissa"}, ["lora.final_rank (target_r) is left out"]),
    (LLAMA_FACTORY_BASE, {"adapter_name_or_path": "x" * 5000, "create_new_adapter": True}, ["lora.stack", "left out"]),
    (AXOLOTL_BASE, {"val_set_size": 0.1, "load_best_model_at_end": True, "metric_for_best_model": "comet"},
     ["metric_for_best_model: comet is not evaluated"]),
    (LLAMA_FACTORY_BASE, {"val_size": 0.1, "predict_with_generate": True}, ["rouge is not available", "bleu, chrf"]),
    (AXOLOTL_BASE, {"chat_template": "jamba", "datasets": [{"path": "r", "type": "chat_template"}]},
     ["chat_template: jamba", "auto"]),
    (AXOLOTL_BASE, {"val_set_size": 500}, ["500", "share"]),
    (AXOLOTL_BASE, {"datasets": [{"path": "r", "type": "chat_template", "split": "train[:20%]"}]}, ["train[:20%]"]),
    (AXOLOTL_BASE, {"lora_dropout": 1.5}, ["lora.dropout", "left out", "less than 1"]),
    (AXOLOTL_BASE, {"base_model": None}, ["model.base is not in the original"]),
    (LLAMA_FACTORY_BASE, {"finetuning_type": "full"}, ["full fine-tuning"]),
    (LLAMA_FACTORY_BASE, {"stage": "ppo"}, ["stage: ppo", "not available"]),
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "pref_loss": "kto_pair"}, ["pref_loss: kto_pair", "not available"]),
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "pref_bco_weight": 0.5}, ["pref_bco_weight", "changes a loss"]),
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "ref_model": "org/other"}, ["ref_model", "model at step 0"]),
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "adapter_name_or_path": "saves/sft"}, ["reference there is the base"]),
    (LLAMA_FACTORY_BASE, {"stage": "kto", "pref_ftx": 0.5}, ["pref_ftx: 0.5", "not available with kto"]),
    (LLAMA_FACTORY_BASE, {"packing": True}, ["documents see each other"]),
    (AXOLOTL_BASE, {"lr_groups": [{"name": "q"}]}, ["lr_groups", "learning rates of their own"]),
    (LLAMA_FACTORY_BASE, {}, ["dataset mine", "dataset_info.json"]),
    (TRL_BASE, {}, ["every token", "data.loss_on"]),
    (TRL_BASE, {"use_peft": False, "lora_target_modules": None}, ["full fine-tuning"]),
    (TRL_BASE, {"lora_target_modules": None}, ["all-linear"]),
    (TRL_BASE, {"beta": 0.1}, ["beta: 0.1", "does not say which", "train.objective (dpo, ipo, "]),
    (TRL_BASE, {"beta": 0.1, "loss_type": "hinge"}, ["loss_type: hinge", "not available"]),
    (TRL_BASE, {"beta": 0.1, "loss_type": ["sigmoid", "bco_pair", "sft"]}, ["bco_pair", "not available"]),
    (TRL_BASE, {"loss_type": ["sft"]}, ["loss_type: ['sft']", "not available"]),
    (TRL_BASE, {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 1]}, ["weight of sigmoid is 0.5"]),
    (TRL_BASE, {"loss_type": "sigmoid", "ld_alpha": 0.5}, ["ld_alpha", "changes a loss"]),
    (TRL_BASE, {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"}, ["f_divergence_type", "changes a loss"]),
    (TRL_BASE, {"loss_type": "apo_zero_unpaired"}, ["loss_type: apo_zero_unpaired", "not available"]),
    (TRL_BASE, {"cpo_alpha": 1.0, "loss_type": "ipo"}, ["loss_type: ipo", "not available"]),
    (TRL_BASE, {"cpo_alpha": 1.0, "alpha": 0.25}, ["alpha: 0.25", "not available"]),
    (TRL_BASE, {"num_generations": 8, "beta": 0.04}, ["grpo", "not available"]),
    (UNSLOTH_BASE, {"full_finetuning": True}, ["full fine-tuning"]),
], ids=str)  # fmt: skip
def test_what_can_not_be_followed_is_reported(convert, base, theirs, words):
    conversion, _ = convert(base | theirs)
    reported = "\n".join(conversion.draft.warnings)
    assert [word for word in words if word not in reported] == []
    assert conversion.text.index("Check these first") < conversion.text.index("\nmodel:")


DPO = {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "length_normalize": False}
IPO = {"beta": 0.1, "sft_weight": 0.0, "length_normalize": True}
ORPO = {"beta": 0.1, "sft_weight": 1.0}
# The defaults of TRL and LLaMA-Factory, which differ from those here.
SIMPO = {"beta": 0.1, "gamma": 0.5, "label_smoothing": 0.0, "sft_weight": 0.0, "length_normalize": True}
CPO = {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 1.0, "length_normalize": False}
KTO = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}


@pytest.mark.parametrize(("base", "theirs", "objective", "options"), [
    (AXOLOTL_BASE, {"rl": "dpo"}, "dpo", DPO),
    (AXOLOTL_BASE, {"rl": "dpo", "rl_beta": 0.3, "trl": {"beta": 0.2}}, "dpo", DPO | {"beta": 0.2}),
    (AXOLOTL_BASE, {"rl": "dpo", "dpo_label_smoothing": 0.1, "rpo_alpha": 0.5}, "dpo",
     DPO | {"label_smoothing": 0.1, "sft_weight": 0.5}),
    (AXOLOTL_BASE, {"rl": "dpo", "dpo_norm_loss": True}, "dpo", DPO | {"length_normalize": True}),
    (AXOLOTL_BASE, {"rl": "dpo", "dpo_loss_type": ["ipo"]}, "ipo", IPO),
    (AXOLOTL_BASE, {"rl": "ipo", "rl_beta": 0.05, "dpo_label_smoothing": 0.1}, "ipo", IPO | {"beta": 0.05}),
    (AXOLOTL_BASE, {"rl": "orpo", "orpo_alpha": 0.2}, "orpo", ORPO | {"beta": 0.2}),
    (AXOLOTL_BASE, {"rl": "orpo", "orpo_alpha": 0.2, "rl_beta": 0.3}, "orpo", ORPO | {"beta": 0.3}),
    (AXOLOTL_BASE, {"rl": "simpo"}, "simpo", SIMPO | {"sft_weight": 1.0}),
    (AXOLOTL_BASE, {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.2, "cpo_alpha": 0}, "simpo",
     SIMPO | {"beta": 2.0, "gamma": 1.2}),
    (AXOLOTL_BASE, {"rl": "kto", "rl_beta": 0.5, "kto_desirable_weight": 0.2}, "kto",
     KTO | {"beta": 0.5, "desirable_weight": 0.2}),
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "pref_beta": 0.2, "pref_ftx": 0.5, "dpo_label_smoothing": 0.1}, "dpo",
     DPO | {"beta": 0.2, "sft_weight": 0.5, "label_smoothing": 0.1}),
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "pref_loss": "ipo"}, "ipo", IPO),
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "pref_loss": "orpo"}, "orpo", ORPO),
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "pref_loss": "orpo", "pref_ftx": 0.5}, "orpo", ORPO | {"sft_weight": 1.5}),
    (LLAMA_FACTORY_BASE, {"stage": "dpo", "pref_loss": "simpo"}, "simpo", SIMPO),
    (LLAMA_FACTORY_BASE, {"stage": "kto", "kto_rejected_weight": 1.5}, "kto", KTO | {"undesirable_weight": 1.5}),
    (TRL_BASE, {"beta": 0.3, "loss_type": "sigmoid"}, "dpo", DPO | {"beta": 0.3}),
    (TRL_BASE, {"loss_type": ["sigmoid_norm"]}, "dpo", DPO | {"length_normalize": True}),
    (TRL_BASE, {"loss_type": "ipo"}, "ipo", IPO),
    (TRL_BASE, {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]}, "dpo", DPO | {"sft_weight": 0.25}),
    (TRL_BASE, {"loss_type": ["sft", "ipo"]}, "ipo", IPO | {"sft_weight": 1.0}),
    (TRL_BASE, {"rpo_alpha": 1.0, "label_smoothing": 0.1}, "dpo", DPO | {"sft_weight": 1.0, "label_smoothing": 0.1}),
    (TRL_BASE, {"cpo_alpha": 0.5, "label_smoothing": 0.1}, "cpo", CPO | {"sft_weight": 0.5, "label_smoothing": 0.1}),
    (TRL_BASE, {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.4}, "simpo",
     SIMPO | {"beta": 2.5, "gamma": 1.4, "sft_weight": 1.0}),
    (TRL_BASE, {"loss_type": "alphapo", "cpo_alpha": 0.5}, "simpo", SIMPO),
    (TRL_BASE, {"beta": 10.0, "gamma_beta_ratio": 0.3}, "simpo", SIMPO | {"beta": 10.0, "gamma": 3.0}),
    (TRL_BASE, {"loss_type": "kto", "undesirable_weight": 1.2}, "kto", KTO | {"undesirable_weight": 1.2}),
    (UNSLOTH_BASE, {"beta": 0.2, "loss_type": "sigmoid"}, "dpo", DPO | {"beta": 0.2}),
], ids=str)  # fmt: skip
def test_an_objective_becomes_ours_with_all_options(convert, base, theirs, objective, options):
    _, config = convert(base | theirs)
    assert config.train.objective == objective
    given = config.train.preference.model_dump(exclude_none=True)
    assert given == pytest.approx(options)
    assert config.data.format == ("kto" if objective == "kto" else "preference")
    assert config.lora.dropout == 0


@pytest.mark.parametrize(("base", "theirs", "center"), [
    (AXOLOTL_BASE, {"reward_model": True, "center_rewards_coefficient": 0.01}, 0.01),
    (LLAMA_FACTORY_BASE, {"stage": "rm"}, None),
    (TRL_BASE, {"center_rewards_coefficient": 0.01}, 0.01),
], ids=str)  # fmt: skip
def test_a_reward_model_becomes_ours(convert, base, theirs, center):
    _, config = convert(base | theirs)
    assert (config.train.objective, config.data.format) == ("reward", "preference")
    assert (config.train.reward and config.train.reward.center) == center


@pytest.mark.parametrize(("command", "objective"), [
    ("trl dpo", "dpo"), ("trl kto", "kto"), ("trl reward", "reward"), ("trl sft", "sft"),
    ("accelerate launch --config_file dpo/zero3.yaml train_orpo.py", "orpo"), ("python -m trl.scripts.dpo", "dpo"),
    ("python dpo-project/scripts/run_sft.py", "sft"), ("python cpo.py", "cpo"),
])  # fmt: skip
def test_trls_trainer_is_told_by_the_command(convert, command, objective):
    _, config = convert(f"{command} --model_name_or_path org/b --dataset_name org/rows --use_peft --beta 0.3")
    assert config.train.objective == objective
    if objective not in ("sft", "reward"):
        assert config.train.preference.beta == 0.3
        assert config.train.learning_rate == 1e-6


@pytest.mark.parametrize(("name", "objective"), [("orpo.yaml", "orpo"), ("config.yaml", "sft"), ("my_kto.yml", "kto")])
def test_trls_trainer_is_told_by_the_files_name(convert, name, objective):
    _, config = convert(TRL_BASE | {"beta": 0.1}, name)
    assert config.train.objective == objective


def test_the_columns_of_axolotls_rated_rows_become_ours(convert):
    kind = {"field_prompt": "q", "field_chosen": "good", "field_rejected": "bad", "prompt_format": "Q: {prompt}"}
    _, config = convert(AXOLOTL_BASE | {"rl": "dpo", "datasets": [
        {"path": "a.jsonl", "type": "chatml.intel"}, {"path": "b.jsonl", "type": kind},
        {"path": "c.jsonl", "type": "chat_template.default", "field_messages": "talk", "field_chosen": "good"},
    ]})  # fmt: skip
    assert [source.columns for source in config.data.train] == [
        {"prompt": "question"}, {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"messages": "talk", "chosen": "good"},
    ]  # fmt: skip
    assert config.data.chat_template == "chatml"


def test_options_of_another_objective_are_dropped(convert):
    conversion, _ = convert(LLAMA_FACTORY_BASE | {"pref_beta": 0.1, "simpo_gamma": 0.5})
    assert (
        conversion.draft.dropped["pref_beta"] == "train.preference takes only options of the objective that is trained"
    )
    assert conversion.draft.dropped["simpo_gamma"] == conversion.draft.dropped["pref_beta"]


@pytest.mark.parametrize(("file", "name", "defaults"), [
    ("trainer/dpo_config.py", "dpo", {"beta": 0.1, "label_smoothing": 0.0, "learning_rate": 1e-6}),
    ("experimental/cpo/cpo_config.py", "simpo", {
        "beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "label_smoothing": 0.0, "learning_rate": 1e-6}),
    ("experimental/orpo/orpo_config.py", "orpo", {"beta": 0.1, "learning_rate": 1e-6}),
    ("trainer/kto_config.py", "kto", {
        "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "learning_rate": 1e-6}),
    ("trainer/reward_config.py", "reward", {"center_rewards_coefficient": None, "learning_rate": 1e-4}),
])  # fmt: skip
def test_trls_defaults_are_those_of_its_config_classes(convert, file, name, defaults):
    """The classes are read, not imported, which takes half a minute."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not (Path(spec.origin).parent / file).exists():
        pytest.skip("needs TRL")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    found = {
        node.target.id: next(ast.literal_eval(one.value) for one in node.value.keywords if one.arg == "default")
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and node.target.id in {*defaults, "disable_dropout", "max_length"}
    }
    assert found == defaults | {"disable_dropout": True, "max_length": 1024}
    given = {"loss_type": "simpo"} if name == "simpo" else {"beta": 0.1}
    _, config = convert(TRL_BASE | given, f"{name}.yaml")
    assert (config.train.objective, config.train.learning_rate) == (name, defaults["learning_rate"])
    assert (config.data.max_seq_len, config.lora.dropout) == (1024, 0)


def test_a_known_key_with_a_value_that_has_no_counterpart_is_dropped_with_its_key_here(convert):
    conversion, _ = convert(TRL_BASE | {"gradient_accumulation_steps": "auto", "train_embeddings": True})
    assert conversion.draft.dropped["train_embeddings"] == "lora.modules_to_save takes no such value"
    assert conversion.draft.dropped["gradient_accumulation_steps"].startswith("train.gradient_accumulation_steps")


def test_a_key_that_nothing_knows_is_named(convert):
    conversion, _ = convert(AXOLOTL_BASE | {"flux_capacitor": 88})
    assert conversion.draft.unknown == ["flux_capacitor"]
    assert "Unknown to qlora, so dropped: flux_capacitor" in conversion.text


def test_the_columns_and_roles_of_axolotls_turns_become_ours(convert):
    _, config = convert(AXOLOTL_BASE | {"datasets": [{
        "path": "rows.jsonl", "type": "chat_template", "field_messages": "talk", "message_property_mappings":
        {"role": "who", "content": "what"}, "roles": {"user": ["caller"], "assistant": ["agent", "gpt"]},
    }]})  # fmt: skip
    (source,) = config.data.train
    assert source.columns == {"messages": "talk", "role": "who", "content": "what"}
    assert source.roles == {"caller": "user", "agent": "assistant"}


def test_axolotls_own_prompt_formats_name_their_columns(convert):
    kind = {"field_instruction": "q", "field_output": "a", "format": "Q: {instruction}"}
    conversion, config = convert(AXOLOTL_BASE | {"datasets": [{"path": "rows.jsonl", "type": kind}]})
    assert config.data.train[0].columns == {"instruction": "q", "output": "a"}
    assert any("prompt format of its own" in warning for warning in conversion.draft.warnings)


def test_files_of_a_json_dataset_become_sources(convert):
    _, config = convert(AXOLOTL_BASE | {"datasets": [
        {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "alpaca"},
        {"path": "org/name", "name": "main", "split": "validation", "revision": "v1", "type": "alpaca"},
    ]})  # fmt: skip
    assert [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl", "org/name"]
    assert (config.data.train[2].subset, config.data.train[2].split, config.data.train[2].revision) == (
        "main", "validation", "v1",
    )  # fmt: skip


INFO = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "question", "response": "answer", "query": ""}},
    "talks": {
        "file_name": "talks.json", "formatting": "sharegpt", "columns": {"messages": "talk"},
        "tags": {"role_tag": "who", "content_tag": "text", "user_tag": "caller", "assistant_tag": "gpt"},
    },
    "far": {"hf_hub_url": "org/far", "subset": "en", "split": "train_sft", "num_samples": 50},
    "wiki": {"file_name": "wiki.txt", "columns": {"prompt": "content"}},
}  # fmt: skip


@pytest.mark.parametrize("place", [".", "data"])
def test_datasets_are_found_through_dataset_info(convert, tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "dataset_info.json").write_text(json.dumps(INFO))
    conversion, config = convert(LLAMA_FACTORY_BASE | {"dataset": "mine, talks, far"})
    mine, talks, far = config.data.train
    assert (mine.path, mine.columns) == (
        str(tmp_path / place / "mine.json"),
        {"instruction": "question", "output": "answer"},
    )
    assert talks.columns == {"messages": "talk", "role": "who", "content": "text"}
    assert talks.roles == {"caller": "user"}
    assert (far.path, far.subset, far.split, far.max_rows) == ("org/far", "en", "train_sft", 50)
    assert not any("dataset_info" in warning for warning in conversion.draft.warnings)


def test_pretraining_text_is_read_from_its_column(convert, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    _, config = convert(LLAMA_FACTORY_BASE | {"stage": "pt", "dataset": "wiki"})
    assert config.data.train[0].columns == {"text": "content"}
    assert (config.data.format, config.data.overlong, config.data.packing) == ("text", "split", "auto")


SCRIPT = r"""#!/bin/bash
set -x
MODEL=org/base   # not a plain assignment, because of this comment
MODEL=org/real
export OUT="runs/here"
mkdir -p "$OUT"
accelerate launch --num_processes 4 --config_file fsdp.yaml sft.py \
    --model_name_or_path ${MODEL} \
    --dataset_name "org/chats" \
    --use_peft --lora_r=8 --lora-alpha 16 \
    --lora_target_modules q_proj v_proj \
    --load_in_4bit True \
    --learning_rate 1e-4 \
    --output_dir $OUT > "$OUT/log" 2>&1 && echo --done
"""


def test_a_command_line_in_a_script_is_read_without_running_it(convert, tmp_path):
    conversion, config = convert(SCRIPT + f"touch {tmp_path / 'was-run'}\n")
    assert conversion.draft.trainer == "TRL"
    assert (config.model.base, config.train.output_dir) == ("org/real", "runs/here")
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 16, ["q_proj", "v_proj"])
    assert config.train.learning_rate == 1e-4
    assert "num_processes" not in conversion.text
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(("command", "trainer"), [
    ("llamafactory-cli train --model_name_or_path org/b --dataset a --output_dir o", "LLaMA-Factory"),
    ("torchrun --nproc_per_node 2 src/train.py --model_name_or_path org/b --stage sft", "LLaMA-Factory"),
    ("python unsloth-cli.py --model_name org/b --r 16 --dataset org/rows", "unsloth"),
    ("trl sft --model_name_or_path org/b --dataset_name org/rows", "TRL"),
    ("python -m trl.scripts.sft --model_name_or_path org/b --dataset_name org/rows", "TRL"),
])  # fmt: skip
def test_the_trainer_is_detected_from_the_command(convert, command, trainer):
    conversion, config = convert(command)
    assert conversion.draft.trainer == trainer
    assert config.model.base == "org/b"


def test_a_template_that_is_written_out_becomes_a_file(convert, tmp_path):
    written = "{% for message in messages %}{{ message.content }}{% endfor %}"
    conversion, config = convert(TRL_BASE | {"chat_template": written})
    assert conversion.draft.template == written
    assert config.data.chat_template == str(tmp_path / "ours.jinja")


@pytest.mark.parametrize(("content", "message"), [
    ("recipe: x\nfoo: 1\n", "is not recognized as a config of axolotl, LLaMA-Factory, unsloth, TRL"),
    ("model: {base: b}\ndata: {train: t}\ntrain: {output_dir: o}\n", "is a config of qlora already"),
    ("just words\n", "is not recognized"),
    ("a: [\n", "can't be read as YAML"),
    ("", "is not recognized"),
    ("- a\n- b\n", "is not recognized"),
])  # fmt: skip
def test_a_file_of_no_known_kind_is_one_error(tmp_path, content, message):
    path = tmp_path / "theirs.yml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        convert_file(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("values", [
    {"base_model": 3, "datasets": "x", "sequence_len": [1], "adapter": {"a": 1}},
    {"base_model": ["a"], "datasets": [3, None, {"path": None}], "num_epochs": "many", "roles": 1},
    {"base_model": "b", "datasets": [{"path": "p", "type": 3, "roles": [1], "message_property_mappings": None}],
     "lora_target_modules": {"a": 1}, "adapter": "lora"},
    {"base_model": "b", "datasets": {"path": "p"}, "special_tokens": 3, "optimizer": [1], "lr_scheduler": 5,
     "warmup_steps": "x", "sequence_len": 2.5},
    {"model_name_or_path": 1, "dataset": 3, "stage": ["sft"], "template": {"a": 1}, "cutoff_len": None, "lora_rank": 0},
    {"model_name_or_path": "b", "dataset_mixture": {"datasets": [1, {"id": 3}]}, "use_peft": 1, "num_train_epochs": 0},
    {"model_name_or_path": "b\n# injected: true", "use_peft": True, "dataset_name": "d\ntrain: {x: 1}"},
], ids=lambda values: str(values)[:30])  # fmt: skip
def test_odd_values_still_give_a_config_that_loads(convert, values):
    _, config = convert(values)
    assert config.data.train


ODD = [
    None, True, 0, -1, 1.5, "", "x", "a b", [], ["a"], [1, None], {}, {"a": 1}, {"path": ["x"]}, "1e-4", float("inf"),
    [[1]], {"datasets": "x"}, {"datasets": [{"id": ["x"]}]}, 10**30, "\x1b[2J", "${X}",
    [{"path": {"a": 1}, "type": ["x"], "roles": {"user": [["a"]]}, "split": 3}],
    [{"path": "p", "type": {"field_instruction": ["x"]}, "message_property_mappings": 3, "field_messages": ["m"]}],
]  # fmt: skip


def test_odd_values_in_public_key_sets_give_a_config_that_loads(convert, seed):
    rng = random.Random(seed)
    for _ in range(150):
        values = values_of(PUBLIC[rng.choice(sorted(PUBLIC))][1])
        changed = rng.sample(sorted(values), min(len(values), rng.choice([1, 3, 8])))
        values |= {name: rng.choice(ODD) for name in changed}
        if detect(values) is not None:  # groups of keys may have been replaced
            _, config = convert(values)
            assert config.data.train


def test_a_converted_config_can_be_previewed(convert, tiny_base, alpaca_file):
    from qlora.training import preview

    _, config = convert(
        AXOLOTL_BASE | {"base_model": str(tiny_base), "datasets": [{"path": str(alpaca_file), "type": "alpaca"}]}
    )
    assert preview(config, 1).train_examples > 0


def test_another_trainers_config_is_answered_with_one_line(tmp_path):
    path = tmp_path / "axolotl.yml"
    path.write_text(yaml.safe_dump(values_of(AXOLOTL["axolotl llama-3/qlora-1b.yml"])))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path} is a config of axolotl. Convert it with: qlora init --from {path} -o my.yaml"


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_our_own_configs_are_not_taken_for_another_trainers(recipe):
    with pytest.raises(ConfigError, match="is a config of qlora already"):
        convert_file(recipe)


def test_the_table_in_the_docs_says_what_the_conversion_does():
    page = (Path(__file__).parents[2] / "docs" / "arriving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+\.\w+)` \|(.*)\|$", page, re.MULTILINE)
    assert len(rows) > 30
    known = NAMES | SAME_NAMES | {"wandb_project": "train.trackers"}
    for key, cells in rows:
        section, _, name = key.partition(".")
        assert name in keys_of(section)
        assert [theirs for theirs in re.findall(r"`(\w+)`", cells) if theirs != name and known.get(theirs) != key] == []


@pytest.mark.parametrize("base", [AXOLOTL_BASE, LLAMA_FACTORY_BASE, TRL_BASE], ids=["axolotl", "LLaMA-Factory", "TRL"])
@pytest.mark.parametrize(("alpha", "expected"), [(5, 5.0), (0, None), (None, None)])
def test_neftunes_noise_is_kept(base, alpha, expected, convert):
    conversion, config = convert(base | {"neftune_noise_alpha": alpha})
    assert config.train.neftune_alpha == expected
    assert "neftune_noise_alpha" not in conversion.text.partition("dropped")[2]


@pytest.mark.parametrize(("base", "keys"), [
    (AXOLOTL_BASE, {"use_dft": True}), (LLAMA_FACTORY_BASE, {"use_dft_loss": True}), (TRL_BASE, {"loss_type": "dft"}),
], ids=["axolotl", "LLaMA-Factory", "TRL"])  # fmt: skip
def test_token_losses_are_kept(base, keys, convert):
    conversion, config = convert(base | keys | {"label_smoothing_factor": 0.1})
    assert (config.train.token_loss, config.train.label_smoothing) == ("dft", 0.1)
    assert not [name for name in keys if name in conversion.text.partition("dropped")[2]]
