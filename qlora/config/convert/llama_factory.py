"""LLaMA-Factory's YAML and command lines, with its dataset_info.json."""

import json
from pathlib import Path
from typing import Any

from qlora.config.convert import values
from qlora.config.convert.common import hold_out, set_template, translate_common
from qlora.config.convert.draft import OFF, Draft
from qlora.config.convert.objectives import translate_llama_factory

# Keys by which LLaMA-Factory's configs are recognized.
MARKS = {
    "stage", "finetuning_type", "cutoff_len", "template", "quantization_bit", "lora_target", "dataset_dir",
    "neat_packing", "lora_rank", "val_size", "plot_loss", "overwrite_cache", "pref_beta",
}  # fmt: skip
DEFAULTS = {
    "lora.rank": 8, "lora.dropout": 0.0, "lora.targets": "all-linear", "data.max_seq_len": 2048,
    "data.packing": False, "data.overlong": "truncate", "train.epochs": 3.0, "train.micro_batch_size": 8,
    "train.gradient_accumulation_steps": 1, "train.learning_rate": 5e-5, "train.lr_scheduler": "linear",
    "train.optimizer": "adamw_32bit", "train.max_grad_norm": 1.0, "train.seed": 42,
}  # fmt: skip
COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "tools": "tools", "messages": "messages", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
}  # fmt: skip
TURN_KEYS = {"role": ("role", "from"), "content": ("content", "value")}
ROLES = {"user": "user", "assistant": "assistant", "observation": "tool", "system": "system"}
KNOWN_ROLES = ("system", "user", "human", "assistant", "gpt", "tool", "observation")
MAX_INFO_BYTES = 10 << 20


def translate(draft: Draft, folder: Path) -> None:
    """Translate a LLaMA-Factory config.

    Args:
        draft: Draft with its values.
        folder: Folder of the config, where dataset_info.json is looked for as well.
    """
    method = draft.peek("finetuning_type")
    stage = draft.peek("stage") or "sft"
    translate_llama_factory(draft)
    if stage == "pt":
        draft.set("data.format", "text", "stage: pt")
        draft.set("data.overlong", "split", "stage: pt")
        draft.set("data.packing", "auto", "stage: pt packs")
    info = _find_info(draft, folder)
    for name, key in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        wanted = values.names(draft.take(name))
        if wanted:
            draft.set(key, [_source(draft, one, info, stage) for one in wanted], name)
    sets = draft.values.get("data.eval", [])
    if values.flag(draft.take("eval_on_each_dataset")) and len(sets) > 1:
        draft.values["data.eval"] = {name: [source] for name, source in zip(wanted, sets, strict=True)}
    draft.take("dataset_dir")
    set_template(draft, draft.take("template"), "template")
    hold_out(draft, draft.take("val_size"), "val_size")
    if values.flag(draft.take("train_on_prompt")):
        draft.set("data.loss_on", "all", "train_on_prompt")
    if values.flag(draft.take("mask_history")):
        draft.set("data.loss_on", "last", "mask_history")
    if values.flag(draft.peek("packing")) and not values.flag(draft.peek("neat_packing")):
        draft.warn("packing lets documents see each other there; here they never do.")
    translate_common(draft, is_full=method in ("full", "freeze"))
    rank = draft.values.get("lora.rank", DEFAULTS["lora.rank"])
    draft.set("lora.alpha", 2 * rank, "LLaMA-Factory's default: twice the rank")
    draft.set_defaults(DEFAULTS)


def _find_info(draft: Draft, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the datasets and what dataset_info.json says of them; nothing if there is none."""
    given = Path(str(draft.peek("dataset_dir") or "data"))
    for place in (given, folder / given, folder, folder.parent / given, folder.parent.parent / given):
        path = place / "dataset_info.json"
        try:
            if path.is_file() and path.stat().st_size <= MAX_INFO_BYTES:
                found = json.loads(path.read_text(encoding="utf-8"))
                return place, found if isinstance(found, dict) else {}
        except (OSError, ValueError, RecursionError):
            draft.warn(f"{path} can't be read as JSON, so datasets are named by hand.")
    return given, {}


def _source(draft: Draft, name: str, found: tuple[Path, dict[str, Any]], stage: str) -> dict[str, Any]:
    folder, info = found
    entry = info.get(name)
    if not isinstance(entry, dict):
        path = folder / name
        draft.warn(
            f"dataset {name}: dataset_info.json was not found or does not name it. Set its path in data.train; "
            f"{path}.json is assumed."
        )
        return {"path": f"{path}.json"}
    hub = entry.get("hf_hub_url")
    if hub is None and entry.get("file_name") is None:
        draft.warn(f"dataset {name} is on another hub; download it and set its path.")
    source: dict[str, Any] = {"path": str(hub or folder / str(entry.get("file_name", f"{name}.json")))}
    for theirs, ours in (("split", "split"), ("subset", "subset")):
        if hub and entry.get(theirs):
            source[ours] = str(entry[theirs])
    if number := values.number(entry.get("num_samples")):
        source["max_rows"] = int(number)
    columns = _columns(entry, stage)
    tags = values.mapping(entry.get("tags"))
    columns |= {
        ours: str(tags[f"{ours}_tag"])
        for ours, standard in TURN_KEYS.items()
        if tags.get(f"{ours}_tag") not in (None, *standard)
    }
    roles = {
        str(tags[f"{theirs}_tag"]): ours
        for theirs, ours in ROLES.items()
        if tags.get(f"{theirs}_tag") is not None and tags[f"{theirs}_tag"] not in KNOWN_ROLES
    }
    for media in ("images", "videos", "audios"):
        if media in values.mapping(entry.get("columns")):
            draft.warn(f"dataset {name} has {media}; only text is supported, and its rows are refused.")
    return source | ({"columns": columns} if columns else {}) | ({"roles": roles} if roles else {})


def _columns(entry: dict[str, Any], stage: str) -> dict[str, str]:
    columns = values.mapping(entry.get("columns"))
    if stage == "pt":
        theirs = columns.get("prompt", "instruction")
        return {} if theirs == "text" else {"text": str(theirs)}
    names = {COLUMNS[name]: str(theirs) for name, theirs in columns.items() if name in COLUMNS and theirs not in OFF}
    if names.get("messages") in ("messages", "conversations", "conversation"):
        del names["messages"]
    return {ours: theirs for ours, theirs in names.items() if ours != theirs}
