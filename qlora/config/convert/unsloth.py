"""unsloth's configs, and the keyword arguments of its notebooks as YAML."""

from pathlib import Path
from typing import Any

from qlora.config.convert import values
from qlora.config.convert.common import flatten, set_template, translate_common
from qlora.config.convert.draft import Draft
from qlora.config.convert.trl import MAPPINGS, supervision, translate_data
from qlora.config.convert.trl_objectives import translate_trl

# Keys by which unsloth's arguments are recognized.
MARKS = {
    "use_gradient_checkpointing", "random_state", "r", "full_finetuning", "fast_inference",
    "finetune_language_layers", "finetune_mlp_modules", "finetune_attention_modules", "loftq_config",
    "train_on_completions", "training_type", "random_seed", "use_loftq", "format_type",
}  # fmt: skip
DEFAULTS = {
    "model.quantization": "nf4", "lora.rank": 16, "lora.alpha": 16, "lora.dropout": 0.0,
    "lora.targets": "all-linear", "data.max_seq_len": 2048, "data.packing": False, "data.overlong": "truncate",
    "train.epochs": 3.0, "train.micro_batch_size": 8, "train.gradient_accumulation_steps": 1,
    "train.learning_rate": 5e-5, "train.lr_scheduler": "linear",
    "train.optimizer": "adamw_32bit", "train.max_grad_norm": 1.0, "train.seed": 42,
}  # fmt: skip


def translate(draft: Draft, folder: Path) -> None:
    """Translate unsloth's arguments.

    Args:
        draft: Draft with its values.
        folder: Folder of the file; unused, since paths are relative to where unsloth is started.
    """
    base = draft.take("model")
    if isinstance(base, str):
        draft.set("model.base", base, "model")
    is_full = values.flag(draft.peek("full_finetuning")) or draft.peek("training_type") == "full"
    if draft.peek("load_in_4bit", "load_in_8bit", "load_in_16bit") is None and not is_full:
        draft.set("model.quantization", "nf4", "unsloth's default")
    draft.take("load_in_16bit")
    is_supervised = translate_trl(draft) is None
    translate_data(draft)
    if (form := values.FORMATS.get(str(draft.take("format_type", "dataset_format")))) is not None:
        draft.set("data.format", form, "format_type")
    set_template(draft, draft.take("chat_template"), "chat_template")
    if is_supervised:
        supervision(draft)
    translate_common(draft, is_full=bool(is_full))
    draft.set_defaults(DEFAULTS)


def normalize(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without the groups that they may be written in, by lower-case names."""
    return {name.lower(): value for name, value in flatten(given, MAPPINGS).items()}
