"""Read the key sets of public configs of other trainers.

In the .txt files here a line without a blank in front names where a key set was found, and the indented words below it
are its keys: `key` has its usual value from `USUAL`, `key=` is empty, and `key=value` has a value in YAML without
blanks. `@name` stands for the words in groups.txt. Only the names of keys are theirs; the values are ours.
"""

from pathlib import Path
from typing import Any

import yaml

USUAL: dict[str, Any] = {
    "base_model": "org/base-8b", "model_name_or_path": "org/base-8b", "model_name": "org/base-8b",
    "datasets": [{"path": "org/instructions", "type": "alpaca"}], "dataset": "identity,alpaca_en_demo",
    "dataset_name": "org/chats", "val_set_size": 0.05, "output_dir": "./outputs/run", "sequence_len": 2048,
    "cutoff_len": 1024, "max_length": 2048, "max_seq_length": 4096, "sample_packing": True, "packing": True,
    "lora_r": 32, "lora_rank": 8, "r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True,
    "lora_target_modules": ["q_proj", "v_proj"], "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gradient_accumulation_steps": 4, "micro_batch_size": 2, "per_device_train_batch_size": 2, "num_epochs": 3,
    "num_train_epochs": 3.0, "optimizer": "adamw_bnb_8bit", "optim": "adamw_8bit", "lr_scheduler": "cosine",
    "lr_scheduler_type": "cosine", "learning_rate": 2e-4, "warmup_ratio": 0.1, "warmup_steps": 10, "weight_decay": 0.01,
    "gradient_checkpointing": True, "logging_steps": 5, "evals_per_epoch": 4, "saves_per_epoch": 1, "eval_steps": 100,
    "save_steps": 200, "save_total_limit": 2, "seed": 42, "random_state": 3407, "max_steps": 60, "max_grad_norm": 1.0,
    "max_samples": 1000, "load_in_4bit": True, "load_in_8bit": True, "trust_remote_code": True, "flash_attention": True,
    "special_tokens": {"pad_token": "<pad>"}, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "per_device_eval_batch_size": 4, "preprocessing_num_workers": 16, "dataset_num_proc": 8, "hub_model_id": "me/model",
    "loss_watchdog_threshold": 5.0, "loss_watchdog_patience": 3, "eval_max_new_tokens": 128,
    "tokens": {"pad_token": "<pad>"},
    "fsdp": ["full_shard"], "fsdp_config": {"fsdp_offload_params": True}, "ddp_timeout": 180000000,
}  # fmt: skip


def read_table(name: str) -> dict[str, str]:
    """Return the entries of a file: names and their words."""
    table: dict[str, str] = {}
    entry = ""
    for line in (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            table[entry] += f" {line.strip()}"
        else:
            entry = line
            table[entry] = ""
    return table


GROUPS = read_table("groups")
AXOLOTL, LLAMA_FACTORY, TRL, UNSLOTH = map(read_table, ("axolotl", "llama_factory", "trl", "unsloth"))


def values_of(words: str) -> dict[str, Any]:
    """Return the keys and values that words stand for; a later word replaces an earlier one."""
    values: dict[str, Any] = {}
    for word in words.split():
        name, equals, text = word.partition("=")
        if name.startswith("@"):
            values |= values_of(GROUPS[name])
        elif equals:
            is_flow = text.startswith(("{", "["))
            values[name] = yaml.safe_load(text.replace(":", ": ").replace(",", ", ") if is_flow else text)
        else:
            values[name] = USUAL.get(name, True)
    return values
