"""Rows to examples, to tokens with a loss mask, to batches."""

from qlora.data.batches import IGNORE_INDEX, Batch, BatchPlan, collate, eval_batches
from qlora.data.datasets import DataReport, Datasets, build_datasets
from qlora.data.template import apply_template, encode_prompt
from qlora.data.tokens import TokenizedExample, make_example, supervised_bytes

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BatchPlan",
    "DataReport",
    "Datasets",
    "TokenizedExample",
    "apply_template",
    "build_datasets",
    "collate",
    "encode_prompt",
    "eval_batches",
    "make_example",
    "supervised_bytes",
]
