"""LoraLinear over any linear layer, its injection into a model, and embeddings and heads trained in full."""

from qlora.lora.function import RecomputedWeights, choose_form
from qlora.lora.inject import Targets, add_lora, linear_layers, lora_layers, match_targets, wrap_layers, wrap_linears
from qlora.lora.linear import LoraLinear, StoredAdapter
from qlora.lora.rows import (
    EmbeddingRows,
    TrainedEmbedding,
    TrainedHead,
    head_blocks,
    train_rows,
    trained_rows,
    wrap_rows,
)
from qlora.lora.spec import AdapterSpec
from qlora.lora.start import LayerStart, apply_starts, starts_from_tensors, starts_to_tensors
from qlora.lora.switch import adapters_off

__all__ = [
    "AdapterSpec",
    "LayerStart",
    "LoraLinear",
    "StoredAdapter",
    "Targets",
    "TrainedEmbedding",
    "TrainedHead",
    "EmbeddingRows",
    "RecomputedWeights",
    "adapters_off",
    "add_lora",
    "apply_starts",
    "choose_form",
    "head_blocks",
    "linear_layers",
    "lora_layers",
    "match_targets",
    "starts_from_tensors",
    "starts_to_tensors",
    "train_rows",
    "trained_rows",
    "wrap_layers",
    "wrap_linears",
    "wrap_rows",
]
