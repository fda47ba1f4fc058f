"""LoraLinear over any linear layer, its initial values and injection, and embeddings and heads trained in full."""

from qlora.lora.direct import read_directly
from qlora.lora.eva import eva_factors, num_directions, redistribute
from qlora.lora.expert_layer import describe_experts, wrap_experts
from qlora.lora.experts import LoraExperts, StoredExperts, lora_experts, reset_experts
from qlora.lora.function import RecomputedWeights, choose_form
from qlora.lora.head import (
    ScoreHead,
    embedding_and_head,
    input_embedding,
    output_head,
    reads_images,
    score_name,
    scores_documents,
    stored_head,
)
from qlora.lora.initial import Factors, orthogonal, pissa
from qlora.lora.inject import (
    Targets,
    add_lora,
    check_ranks,
    linear_layers,
    lora_layers,
    match_targets,
    specs_of_experts,
    wrap_layers,
    wrap_linears,
)
from qlora.lora.linear import LoraLinear, StoredAdapter, linears_of
from qlora.lora.match import matches, unmatched
from qlora.lora.plain import is_linear
from qlora.lora.ranks import RankBudget
from qlora.lora.reconstruction import Reconstruction, reconstruct, subtract
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
from qlora.lora.start import (
    LayerStart,
    apply_first,
    apply_starts,
    keep_starts,
    starts_from_tensors,
    starts_to_tensors,
)
from qlora.lora.statistics import InputObserver, InputStatistics
from qlora.lora.switch import adapters_at_start, adapters_off
from qlora.lora.text_part import TextPart, text_model, text_part

__all__ = [
    "AdapterSpec",
    "EmbeddingRows",
    "Factors",
    "InputObserver",
    "InputStatistics",
    "LayerStart",
    "LoraExperts",
    "LoraLinear",
    "RankBudget",
    "RecomputedWeights",
    "Reconstruction",
    "ScoreHead",
    "StoredAdapter",
    "StoredExperts",
    "Targets",
    "TextPart",
    "TrainedEmbedding",
    "TrainedHead",
    "adapters_at_start",
    "adapters_off",
    "add_lora",
    "apply_first",
    "embedding_and_head",
    "input_embedding",
    "reads_images",
    "score_name",
    "apply_starts",
    "check_ranks",
    "choose_form",
    "describe_experts",
    "eva_factors",
    "head_blocks",
    "is_linear",
    "keep_starts",
    "linear_layers",
    "linears_of",
    "lora_experts",
    "lora_layers",
    "match_targets",
    "matches",
    "num_directions",
    "orthogonal",
    "output_head",
    "pissa",
    "read_directly",
    "reconstruct",
    "redistribute",
    "reset_experts",
    "scores_documents",
    "specs_of_experts",
    "starts_from_tensors",
    "starts_to_tensors",
    "stored_head",
    "subtract",
    "text_model",
    "text_part",
    "train_rows",
    "trained_rows",
    "unmatched",
    "wrap_experts",
    "wrap_layers",
    "wrap_linears",
    "wrap_rows",
]
