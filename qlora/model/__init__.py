"""A base in 4 bits with adapters on it: loading, loss, evaluation, generation."""

from qlora.model.base import load_base
from qlora.model.base_weights import BaseWeights
from qlora.model.device import resolve_compute_dtype, resolve_device
from qlora.model.evaluate import Evaluation, evaluate
from qlora.model.formats import BITSANDBYTES_4BIT, weight_format
from qlora.model.from_config import (
    adapt,
    adapter_spec,
    base_from_section,
    datasets_from_section,
    group_rates,
    optimizer_from_section,
    set_tokens,
)
from qlora.model.generate import answer, end_token_ids, generate
from qlora.model.inventory import frozen_checksum, take_inventory
from qlora.model.loss import SUPERVISED, Loss, StepLoss, check_isolation, check_loss, supervised_loss
from qlora.model.restore import load_model, load_run, load_run_tokenizer
from qlora.model.skeleton import build_skeleton
from qlora.model.tokenizer import load_generation_config, load_tokenizer

__all__ = [
    "BITSANDBYTES_4BIT",
    "SUPERVISED",
    "BaseWeights",
    "Evaluation",
    "Loss",
    "StepLoss",
    "adapt",
    "adapter_spec",
    "answer",
    "base_from_section",
    "build_skeleton",
    "check_isolation",
    "check_loss",
    "datasets_from_section",
    "end_token_ids",
    "evaluate",
    "frozen_checksum",
    "generate",
    "group_rates",
    "load_base",
    "load_generation_config",
    "load_model",
    "load_run",
    "load_run_tokenizer",
    "load_tokenizer",
    "optimizer_from_section",
    "resolve_compute_dtype",
    "resolve_device",
    "set_tokens",
    "supervised_loss",
    "take_inventory",
    "weight_format",
]
