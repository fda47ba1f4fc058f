"""A base in 4 bits with adapters on it: loading, loss, evaluation, generation."""

from qlora.model.answers import answer_all
from qlora.model.base import load_base, load_frozen
from qlora.model.base_weights import BaseWeights
from qlora.model.device import resolve_compute_dtype, resolve_device
from qlora.model.evaluate import Evaluation, evaluate
from qlora.model.formats import BITSANDBYTES_4BIT, weight_format
from qlora.model.from_config import (
    adapt,
    adapter_spec,
    adapter_specs,
    base_files,
    base_from_section,
    check_base,
    check_documents,
    datasets_from_section,
    expert_specs,
    flat_parameters,
    group_rates,
    optimizer_from_section,
    set_tokens,
    with_images,
)
from qlora.model.generate import answer, end_token_ids, generate
from qlora.model.host_memory import free_host_bytes
from qlora.model.initial import load_for_training
from qlora.model.inventory import frozen_checksum, take_inventory
from qlora.model.isolation import Isolation, choose_ways, keep_apart, mixed_reason, unpackable_reason
from qlora.model.labels import LABELS_FILE, labels_from_config, read_labels, write_labels
from qlora.model.loss import SUPERVISED, Loss, StepLoss, check_loss, supervised_loss, token_loss
from qlora.model.predict import Prediction, predict
from qlora.model.processor import load_processor
from qlora.model.restore import (
    find_foreign,
    load_adapted,
    load_adapter_tokenizer,
    load_model,
    load_model_tokenizer,
    load_run,
    load_run_tokenizer,
)
from qlora.model.skeleton import build_skeleton, positions_of, read_config
from qlora.model.source import AdapterSource, open_source
from qlora.model.starts import Starts, has_codes, load_started_base, starts_of, subtracted
from qlora.model.tokenizer import load_generation_config, load_tokenizer

__all__ = [
    "free_host_bytes",
    "BITSANDBYTES_4BIT",
    "LABELS_FILE",
    "SUPERVISED",
    "AdapterSource",
    "BaseWeights",
    "Evaluation",
    "Isolation",
    "Loss",
    "Prediction",
    "Starts",
    "StepLoss",
    "adapt",
    "adapter_spec",
    "adapter_specs",
    "answer",
    "answer_all",
    "base_files",
    "base_from_section",
    "build_skeleton",
    "check_base",
    "check_documents",
    "check_loss",
    "choose_ways",
    "datasets_from_section",
    "end_token_ids",
    "evaluate",
    "expert_specs",
    "flat_parameters",
    "frozen_checksum",
    "generate",
    "group_rates",
    "has_codes",
    "keep_apart",
    "labels_from_config",
    "load_base",
    "load_for_training",
    "load_frozen",
    "load_generation_config",
    "find_foreign",
    "load_adapted",
    "mixed_reason",
    "load_adapter_tokenizer",
    "load_model",
    "load_model_tokenizer",
    "load_processor",
    "open_source",
    "load_run",
    "load_run_tokenizer",
    "load_started_base",
    "load_tokenizer",
    "optimizer_from_section",
    "resolve_compute_dtype",
    "predict",
    "positions_of",
    "read_config",
    "read_labels",
    "resolve_device",
    "set_tokens",
    "starts_of",
    "subtracted",
    "supervised_loss",
    "take_inventory",
    "token_loss",
    "unpackable_reason",
    "weight_format",
    "with_images",
    "write_labels",
]
