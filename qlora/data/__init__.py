"""Data: rows to examples, to tokens with weights, to packed rows, to batches."""

from qlora.data.batches import IGNORE_INDEX, Batch, BatchPlan, collate, eval_batches, to_device
from qlora.data.datasets import MAIN_SET, RETAIN_SET, Datasets, build_datasets
from qlora.data.encode import answer_end_id
from qlora.data.given_rows import store_rows
from qlora.data.images import ImageProcessor, as_data_uri
from qlora.data.labels import LABEL, Labels, find_labels, labels_from_dict
from qlora.data.new_tokens import add_new_tokens, choose_pad_token, new_token_ids, set_special_tokens
from qlora.data.options import EncodeOptions
from qlora.data.prompts import check_prompts, read_prompts
from qlora.data.questions import Question, prompt_text, read_questions
from qlora.data.report import DataReport
from qlora.data.samples import Piece, pieces, split_shared
from qlora.data.sources import Source
from qlora.data.store import ExampleSet
from qlora.data.template import apply_template, encode_prompt, template_name
from qlora.data.tokens import TokenizedExample, make_example, supervised_bytes

__all__ = [
    "IGNORE_INDEX",
    "LABEL",
    "MAIN_SET",
    "RETAIN_SET",
    "Batch",
    "BatchPlan",
    "DataReport",
    "Datasets",
    "EncodeOptions",
    "ExampleSet",
    "ImageProcessor",
    "Labels",
    "Piece",
    "Question",
    "Source",
    "TokenizedExample",
    "add_new_tokens",
    "answer_end_id",
    "apply_template",
    "as_data_uri",
    "build_datasets",
    "check_prompts",
    "choose_pad_token",
    "collate",
    "encode_prompt",
    "eval_batches",
    "find_labels",
    "labels_from_dict",
    "make_example",
    "new_token_ids",
    "pieces",
    "prompt_text",
    "read_prompts",
    "read_questions",
    "set_special_tokens",
    "split_shared",
    "store_rows",
    "supervised_bytes",
    "template_name",
    "to_device",
]
