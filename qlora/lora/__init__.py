"""LoraLinear over any linear layer, its initial values and injection, and embeddings and heads trained in full."""

from qlora.lora.eva import eva_factors, num_directions, redistribute
from qlora.lora.function import RecomputedWeights, choose_form
from qlora.lora.initial import Factors, kaiming_scale, orthogonal, pissa
from qlora.lora.inject import add_lora, lora_layers, match_targets, wrap_linears
from qlora.lora.linear import LoraLinear
from qlora.lora.reconstruction import Reconstruction, reconstruct, subtract
from qlora.lora.rows import EmbeddingRows, TrainedEmbedding, TrainedHead, head_blocks, train_rows, trained_rows
from qlora.lora.spec import AdapterSpec
from qlora.lora.statistics import InputObserver, InputStatistics
from qlora.lora.switch import adapters_off

__all__ = [
    "AdapterSpec",
    "Factors",
    "InputObserver",
    "InputStatistics",
    "LoraLinear",
    "Reconstruction",
    "TrainedEmbedding",
    "TrainedHead",
    "EmbeddingRows",
    "RecomputedWeights",
    "adapters_off",
    "add_lora",
    "choose_form",
    "eva_factors",
    "head_blocks",
    "kaiming_scale",
    "lora_layers",
    "match_targets",
    "num_directions",
    "orthogonal",
    "pissa",
    "reconstruct",
    "redistribute",
    "subtract",
    "train_rows",
    "trained_rows",
    "wrap_linears",
]
