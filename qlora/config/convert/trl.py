"""TRL's and transformers' arguments, as YAML or on a command line."""

from pathlib import Path
from typing import Any

from qlora.config.convert import values
from qlora.config.convert.common import flatten, hold_out, set_template, translate_common
from qlora.config.convert.draft import OFF, Draft
from qlora.config.convert.trl_objectives import translate_trl

# Keys by which TRL's and transformers' arguments are recognized.
MARKS = {
    "model_name_or_path", "per_device_train_batch_size", "num_train_epochs", "use_peft", "dataset_name",
    "lora_target_modules", "dataset_train_split", "dataset_mixture", "dataset_mixer", "torch_dtype", "optim",
    "lr_scheduler_type", "assistant_only_loss", "dataset_text_field", "use_peft_lora", "report_to",
}  # fmt: skip
DEFAULTS = {
    "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.05, "data.max_seq_len": 1024, "data.packing": False,
    "data.overlong": "truncate", "train.epochs": 3.0, "train.micro_batch_size": 8,
    "train.gradient_accumulation_steps": 1, "train.learning_rate": 2e-5, "train.lr_scheduler": "linear",
    "train.optimizer": "adamw_32bit", "train.max_grad_norm": 1.0, "train.seed": 42,
}  # fmt: skip
# Mappings that are values, not groups of keys.
MAPPINGS = {
    "lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "dataset_mixture", "dataset_mixer", "model_init_kwargs",
    "dataset_kwargs", "accelerator_config", "fsdp_config", "deepspeed", "bnb_config_kwargs", "optim_args", "env",
    "loftq_config", "eva_config", "rank_pattern", "eval_dataset", "alpha_pattern", "rope_scaling",
}  # fmt: skip


def translate(draft: Draft, folder: Path) -> None:
    """Translate TRL's arguments.

    Args:
        draft: Draft with its values.
        folder: Folder of the file; unused, since paths are relative to where TRL is started.
    """
    adapters = draft.peek(
        "use_peft", "use_peft_lora", "lora_r", "lora_alpha", "lora_target_modules", "r", "lora_modules"
    )
    defaults = translate_trl(draft)
    if draft.peek("loss_type") in ("nll", "chunked_nll"):
        draft.drop("loss_type", "the loss is the mean over supervised tokens, computed in chunks")
    if draft.peek("loss_type") == "dft":
        draft.set("train.token_loss", draft.take("loss_type"), "loss_type")
    translate_data(draft)
    name, template = draft.take_named("chat_template_path", "chat_template", "chat_template_format")
    set_template(draft, template, name)
    if defaults is None:
        supervision(draft)
    lengths = [values.number(draft.take(name)) for name in ("source_max_len", "target_max_len")]
    if all(lengths):
        draft.set("data.max_seq_len", sum(int(length or 0) for length in lengths), "source_max_len + target_max_len")
    if draft.peek("lora_target_modules", "target_modules", "lora_modules") is None and adapters:
        draft.warn("It leaves the targets to PEFT, which has a list for each family; lora.targets is all-linear here.")
    double = draft.peek("use_bnb_nested_quant", "use_nested_quant", "double_quant", "bnb_4bit_use_double_quant")
    translate_common(draft, is_full=not adapters)
    if draft.values["model.quantization"] == "nf4" and double is None:
        draft.set("model.double_quant", False, "TRL's default")
    draft.set_defaults(DEFAULTS | (defaults or {}))


def supervision(draft: Draft) -> None:
    """Translate which tokens are supervised; by default these trainers supervise whole conversations."""
    names = ("assistant_only_loss", "completion_only_loss", "completions_only", "train_on_completions",
             "train_on_responses_only")  # fmt: skip
    given = [values.flag(draft.take(name)) for name in names]
    if any(given):
        draft.set("data.loss_on", "assistant", "answers only")
    elif False in given:
        draft.set("data.loss_on", "all", "not answers only")
    else:
        draft.warn(
            f"{draft.trainer} supervises every token of a conversation by default; here only answers are supervised. "
            "data.loss_on: all supervises everything."
        )


def translate_data(draft: Draft) -> None:
    """Translate the datasets, by name, as a file, or as a mixture."""
    splits = values.names(draft.take("dataset_splits", "splits"))
    train_split = draft.take("dataset_train_split", "train_split", "dataset_split") or next(iter(splits), None)
    test_split = draft.take("dataset_test_split", "eval_split") or next(iter(splits[1:]), None)
    subset = draft.take("dataset_config", "dataset_subset", "subset")
    text = draft.take("dataset_text_field")
    columns = {"text": text} if text not in (None, "text", "messages") else {}
    mixture = draft.take("dataset_mixture", "datasets")
    mixed = draft.take("dataset_mixer")
    configs = values.names(draft.take("dataset_configs"))
    if isinstance(mixture, dict):
        hold_out(draft, mixture.get("test_split_size"), "test_split_size")
        mixture = mixture.get("datasets")
    if isinstance(mixture, list):
        sources = [_mixed(draft, one) for one in mixture if isinstance(one, dict)]
        draft.set("data.train", [source for source in sources if source], "dataset_mixture")
    if isinstance(mixed, dict):
        pairs = zip(mixed.items(), configs + [None] * len(mixed), strict=False)
        sources = [
            _trimmed({"path": path, "subset": config, "split": train_split, "weight": weight})
            for (path, weight), config in pairs
        ]
        draft.set("data.train", sources, "dataset_mixer")
    name, paths = draft.take_named("dataset_name", "dataset", "train_file", "train_files", "data_path", "dataset_path",
                       "local_dataset", "data_files")  # fmt: skip
    for path in values.paths(paths):
        source = _trimmed({"path": path, "subset": subset, "split": train_split, "columns": columns or None})
        draft.values.setdefault("data.train", []).append(source)
        draft.comments["data.train"] = name
    name, held_out = draft.take_named("eval_dataset", "validation_file", "eval_file", "local_eval_dataset")
    strategy = draft.peek("eval_strategy", "evaluation_strategy")
    first = (draft.values.get("data.train") or [{}])[0]
    if isinstance(held_out, dict) and all(isinstance(path, str) for path in held_out.values()):
        draft.set("data.eval", {str(key): [{"path": path}] for key, path in held_out.items()}, name)
    elif isinstance(held_out, str):
        draft.set("data.eval", [{"path": held_out}], name)
    elif strategy not in (None, "no", False) and isinstance(paths, str) and "/" in paths and not Path(paths).exists():
        draft.set("data.eval", [first | {"split": test_split or "test"}], "the test split")
    name, size = draft.take_named("eval_dataset_size", "val_size", "val_set_size", "eval_split_size")
    hold_out(draft, size, name)


def _mixed(draft: Draft, entry: dict[str, Any]) -> dict[str, Any]:
    files = values.paths(entry.get("data_files"))
    path = entry.get("id") or entry.get("path")
    if files and path in ("json", "csv", "parquet", "text", None):
        path = files[0]
    split = str(entry.get("split") or "")
    if "[" in split:
        draft.warn(f"split: {split} takes a part of {path}; here all of its rows are read, or data.max_rows.")
    return _trimmed(
        {
            "path": path,
            "subset": entry.get("config") or entry.get("name"),
            "split": split.partition("[")[0] or None,
            "weight": entry.get("weight"),
        }
    )


def _trimmed(source: dict[str, Any]) -> dict[str, Any]:
    """Return a source without what is a default."""
    defaults = {"split": "train", "subset": "default", "weight": 1}
    return {key: value for key, value in source.items() if value not in (*OFF, defaults.get(key))}


def normalize(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without the groups that they may be written in."""
    return flatten(given, MAPPINGS)
