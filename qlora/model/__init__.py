"""A base in 4 bits with adapters on it: loading, loss, evaluation, generation."""

from qlora.model.attention import use_document_attention
from qlora.model.base import (
    build_skeleton,
    load_base,
    load_generation_config,
    load_tokenizer,
    resolve_compute_dtype,
    resolve_device,
)
from qlora.model.evaluate import Evaluation, evaluate
from qlora.model.generate import end_token_ids, generate
from qlora.model.inventory import Inventory, frozen_checksum, take_inventory
from qlora.model.loss import check_isolation, check_loss, supervised_loss
from qlora.model.rebuild import rebuild_activations
from qlora.model.recompute import apply_recompute, recompute_levels
from qlora.model.restore import (
    adapt,
    base_from_section,
    datasets_from_section,
    load_model,
    load_run,
    load_run_tokenizer,
)
from qlora.model.weight_cache import hold_weights

__all__ = [
    "Evaluation",
    "Inventory",
    "adapt",
    "apply_recompute",
    "base_from_section",
    "build_skeleton",
    "check_isolation",
    "check_loss",
    "datasets_from_section",
    "end_token_ids",
    "evaluate",
    "frozen_checksum",
    "generate",
    "hold_weights",
    "load_base",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "load_run",
    "load_run_tokenizer",
    "rebuild_activations",
    "recompute_levels",
    "resolve_compute_dtype",
    "resolve_device",
    "supervised_loss",
    "take_inventory",
    "use_document_attention",
]
