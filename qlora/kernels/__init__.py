"""Fast operations; most have a twin in plain torch."""

from qlora.kernels.attention import causal_attention
from qlora.kernels.cross_entropy import linear_cross_entropy, linear_token_loss, loss_path
from qlora.kernels.deltas import Delta, LowRank, SparseRows, fold, row_norms, row_scale, scale_rows
from qlora.kernels.dequantize import HAS_TRITON, dequantize_4bit_plain
from qlora.kernels.fill_up import fill_up_rows
from qlora.kernels.fused import describe_failure, unfused_reason
from qlora.kernels.gated import ACTIVATIONS, GatedProduct
from qlora.kernels.grouped import (
    FEW_ROWS,
    ROWS_PER_TOKEN,
    ExpertGroup,
    experts_at_once,
    experts_path,
    fold_group,
    group_experts,
    grouped_matmul,
    grouped_outer,
    weights_of_group,
)
from qlora.kernels.kl_divergence import linear_kl_divergence
from qlora.kernels.log_probs import linear_log_probs
from qlora.kernels.norm import RMSNorm
from qlora.kernels.packed import PackedWeight, can_pack
from qlora.kernels.quantize import quantize_4bit_cpu
from qlora.kernels.rebuild import Recipe, rebuilt, recipe_of
from qlora.kernels.rotary import rotate
from qlora.kernels.saved import save_first
from qlora.kernels.scratch import free_scratch, scratch

__all__ = [
    "ACTIVATIONS",
    "Delta",
    "FEW_ROWS",
    "HAS_TRITON",
    "ExpertGroup",
    "GatedProduct",
    "LowRank",
    "PackedWeight",
    "RMSNorm",
    "ROWS_PER_TOKEN",
    "Recipe",
    "SparseRows",
    "can_pack",
    "causal_attention",
    "describe_failure",
    "dequantize_4bit_plain",
    "experts_at_once",
    "experts_path",
    "fill_up_rows",
    "fold",
    "fold_group",
    "free_scratch",
    "group_experts",
    "grouped_matmul",
    "grouped_outer",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_log_probs",
    "linear_token_loss",
    "loss_path",
    "quantize_4bit_cpu",
    "rebuilt",
    "recipe_of",
    "rotate",
    "row_norms",
    "row_scale",
    "save_first",
    "scale_rows",
    "scratch",
    "unfused_reason",
    "weights_of_group",
]
