"""A base in 4 bits with adapters on it: loading, loss, evaluation, generation."""

from qlora.model.base import (
    build_skeleton,
    load_base,
    load_generation_config,
    load_tokenizer,
    resolve_compute_dtype,
    resolve_device,
)
from qlora.model.evaluate import Evaluation, evaluate
from qlora.model.from_config import adapt, adapter_spec, base_from_section, datasets_from_section, set_tokens
from qlora.model.generate import end_token_ids, generate
from qlora.model.inventory import Inventory, frozen_checksum, take_inventory
from qlora.model.loss import check_isolation, check_loss, supervised_loss
from qlora.model.restore import load_model, load_run, load_run_tokenizer

__all__ = [
    "Evaluation",
    "Inventory",
    "adapt",
    "adapter_spec",
    "base_from_section",
    "build_skeleton",
    "check_isolation",
    "check_loss",
    "datasets_from_section",
    "end_token_ids",
    "evaluate",
    "frozen_checksum",
    "generate",
    "load_base",
    "load_generation_config",
    "load_model",
    "load_run",
    "load_run_tokenizer",
    "load_tokenizer",
    "resolve_compute_dtype",
    "resolve_device",
    "set_tokens",
    "supervised_loss",
    "take_inventory",
]
