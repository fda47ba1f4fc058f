"""axolotl's YAML."""

from pathlib import Path
from typing import Any

from qlora.config.convert import values
from qlora.config.convert.common import hold_out, set_template, translate_common
from qlora.config.convert.draft import OFF, Draft
from qlora.config.convert.objectives import translate_axolotl

# Keys by which axolotl's configs are recognized.
MARKS = {
    "base_model", "sequence_len", "num_epochs", "micro_batch_size", "datasets", "val_set_size", "adapter",
    "dataset_prepared_path", "sample_packing", "lora_target_linear", "pad_to_sequence_len", "evals_per_epoch",
    "saves_per_epoch", "pretraining_dataset", "tokenizer_type", "strict", "flash_attention",
}  # fmt: skip
DEFAULTS = {
    "lora.dropout": 0.0, "data.max_seq_len": 512, "data.packing": False, "data.overlong": "drop",
    "train.epochs": 1.0, "train.micro_batch_size": 1, "train.gradient_accumulation_steps": 1,
    "train.optimizer": "adamw_32bit", "train.lr_scheduler": "cosine", "train.max_grad_norm": 1.0, "train.seed": 42,
}  # fmt: skip
# Datasets by their type: our format, and our names of their columns where these differ.
TYPES: dict[str, tuple[str | None, dict[str, str]]] = {
    "alpaca": ("alpaca", {}),
    "alpaca_chat": ("alpaca", {}),
    "alpaca_chat.load_qa": ("alpaca", {"instruction": "question", "output": "answer"}),
    "alpaca_w_system": ("alpaca", {}),
    "alpaca_w_system.load_open_orca": (
        "alpaca", {"system": "system_prompt", "instruction": "question", "output": "response"}
    ),
    "gpteacher": ("alpaca", {}),
    "oasst": ("alpaca", {"instruction": "INSTRUCTION", "output": "RESPONSE"}),
    "jeopardy": ("alpaca", {"instruction": "question", "output": "answer"}),
    "summarizetldr": ("alpaca", {"instruction": "article", "output": "summary"}),
    "metharme": ("completion", {"completion": "generation"}),
    "completion": ("text", {}),
    "pretrain": ("text", {}),
    "sharegpt": (None, {}),
    "chat_template": (None, {}),
}  # fmt: skip
# Types whose prompts have Alpaca's form, regardless of the chat template.
ALPACA_STYLE = {"alpaca", "gpteacher"}
# Types of rated rows by the part of their name that says where the prompt is, if it is in a column of another name.
RATED_PROMPTS = {"bradley_terry": "input", "intel": "question", "icr": "input"}
# The same types by the part that names their chat template.
RATED_TEMPLATES = ("chatml", "llama3")
FILE_TYPES = ("json", "csv", "parquet", "arrow", "text")
# Speakers that are known here without a mapping.
KNOWN_ROLES = ("system", "user", "human", "assistant", "gpt", "tool")


def translate(draft: Draft, folder: Path) -> None:
    """Translate an axolotl config.

    Args:
        draft: Draft with its values.
        folder: Folder of the config; unused, since paths are relative to where axolotl is started.
    """
    is_full = draft.peek("adapter") in OFF
    _data(draft)
    translate_axolotl(draft)
    hold_out(draft, draft.take("val_set_size"), "val_set_size")
    if values.flag(draft.take("train_on_inputs")):
        draft.set("data.loss_on", "all", "train_on_inputs")
    total, micro = values.number(draft.take("batch_size")), values.number(draft.peek("micro_batch_size"))
    if total and micro and draft.peek("gradient_accumulation_steps") is None:
        steps = max(1, int(total // micro))
        draft.set("train.gradient_accumulation_steps", steps, f"batch_size: {total} ÷ micro_batch_size: {micro}")
    translate_common(draft, is_full)
    if draft.values.get("data.format") == "text":
        draft.set("data.overlong", "split", "axolotl splits long texts")
    draft.set_defaults(DEFAULTS)


def _data(draft: Draft) -> None:
    template = draft.take("chat_template")
    if template == "jinja" or draft.peek("chat_template_jinja") not in OFF:
        template = draft.take("chat_template_jinja")
    styles: set[str] = set()
    for name, key in (
        ("datasets", "data.train"), ("pretraining_dataset", "data.train"), ("test_datasets", "data.eval"),
    ):  # fmt: skip
        entries = draft.take(name)
        if entries in OFF:
            continue
        entries = [entries] if isinstance(entries, dict | str) else entries
        sources = []
        for given in entries if isinstance(entries, list) else []:
            entry = {"path": given, "type": "completion"} if isinstance(given, str) else given
            if not isinstance(entry, dict):
                draft.warn(f"{name}: {given!r:.40} is not a dataset.")
                continue
            entry = dict(entry)
            if name == "pretraining_dataset":
                entry.setdefault("type", "pretrain")
            styles.add(_style(entry))
            template = template or entry.get("chat_template_jinja") or entry.get("chat_template")
            if _is_rated(draft) and (style := str(entry.get("type")).partition(".")[0]) in RATED_TEMPLATES:
                template = template or style
            sources += _sources(draft, entry, name)
        formats = {source.get("format") for source in sources}
        if key == "data.train" and len(formats) == 1 and formats != {None}:
            draft.set("data.format", formats.pop(), "type of the datasets")
            sources = [{ours: value for ours, value in source.items() if ours != "format"} for source in sources]
        draft.set(key, sources, name)
    if styles == {"alpaca"}:
        draft.set("data.chat_template", "alpaca", "type: alpaca writes its prompts in this style")
        draft.warn(
            "type: alpaca puts a sentence (Below is an instruction that describes a task. …) in front of its prompts; "
            "the chat template alpaca here has the same headings without it. Name a jinja file to have it."
        )
    else:
        if len(styles - {"text"}) > 1:
            draft.warn("Its datasets have prompts in several styles; here one chat template writes all of them.")
        set_template(draft, template, "chat_template")


def _style(entry: dict[str, Any]) -> str:
    kind = entry.get("type")
    name = str(kind).partition(":")[0]
    if name in ("completion", "pretrain"):
        return "text"
    if isinstance(kind, str) and kind in ALPACA_STYLE:
        return "alpaca"
    return "template"


def _sources(draft: Draft, entry: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a dataset's sources; keys that nothing reads are dropped by their names."""
    path, files = entry.pop("path", None), values.paths(entry.pop("data_files", None))
    source: dict[str, Any] = {}
    if (split := entry.pop("split", None)) not in (None, "train"):
        source["split"] = str(split).partition("[")[0]
        if "[" in str(split):
            draft.warn(f"split: {split} takes a part of {path}; here all of its rows are read, or data.max_rows.")
            source = {} if source["split"] == "train" else source
    for theirs, ours in (("name", "subset"), ("revision", "revision")):
        if (value := entry.pop(theirs, None)) is not None:
            source[ours] = str(value)
    source |= _format(draft, entry, path)
    kind = entry.pop("ds_type", None)
    for key in list(entry):
        if key not in ("chat_template", "chat_template_jinja") and entry[key] not in OFF:
            draft.dropped[f"{name}[].{key}"] = "a source here has path, split, subset, format, columns and roles"
    paths = [path] if path not in FILE_TYPES or not files else files
    if files and path not in FILE_TYPES:
        local = Path(str(path)).is_dir()
        paths = [str(Path(str(path)) / file) for file in files] if local else paths
        if not local:
            draft.warn(f"data_files of {path}: files of a hub dataset can't be chosen; the whole split is read.")
    if isinstance(kind, str) and kind in FILE_TYPES and paths and Path(str(paths[0])).is_file():
        source |= {} if Path(str(paths[0])).suffix else {"type": kind}
    return [{"path": str(one), **source} for one in paths if one]


def _is_rated(draft: Draft) -> bool:
    return draft.peek("rl", "reward_model", "process_reward_model") not in OFF


def _rated_columns(draft: Draft, kind: Any, path: Any) -> dict[str, str]:
    """Return names of columns of rows with preferences or ratings; their format follows from the objective."""
    if not isinstance(kind, dict):
        parts = str(kind).split(".")
        prompt = RATED_PROMPTS.get(parts[0]) or RATED_PROMPTS.get(parts[-1])
        return {} if prompt is None else {"prompt": prompt}
    if any(name.endswith("_format") for name in map(str, kind)):
        draft.warn(f"{path} has a prompt format of its own; here the chat template writes its prompts.")
    names = ("system", "prompt", "chosen", "rejected", "completion", "label")
    return {ours: str(kind[f"field_{ours}"]) for ours in names if kind.get(f"field_{ours}") not in (None, ours)}


def _format(draft: Draft, entry: dict[str, Any], path: Any) -> dict[str, Any]:
    kind = entry.pop("type", None)
    columns: dict[str, str] = {}
    result: dict[str, Any] = {}
    if _is_rated(draft):
        columns = _rated_columns(draft, kind, path)
    elif isinstance(kind, dict):
        result["format"] = "alpaca"
        columns = {
            ours: kind[f"field_{ours}"]
            for ours in ("system", "instruction", "input", "output")
            if kind.get(f"field_{ours}") not in (None, ours)
        }
        if kind.get("format") or kind.get("no_input_format"):
            draft.warn(f"{path} has a prompt format of its own; here the chat template writes its prompts.")
    elif isinstance(kind, str):
        name = kind.partition(":")[0]
        known = TYPES.get(name) or TYPES.get(name.partition(".")[0])
        if known is None:
            draft.warn(f"type: {kind} of {path} is not known; its format is detected from the column names.")
        else:
            result |= {"format": known[0]} if known[0] else {}
            columns = dict(known[1])
            if ":" in kind and known[0] == "alpaca" or name == "alpaca_chat":
                draft.warn(f"type: {kind} writes prompts in a style of its own; here the chat template writes them.")
    text_column = entry.pop("text_column", None)
    field = entry.pop("field", None) or text_column
    if field not in (None, "text") and result.get("format") == "text":
        columns["text"] = field
    turns = entry.pop("field_messages", None)
    if turns not in (None, "messages", "conversations", "conversation"):
        columns["messages"] = turns
    for ours in ("chosen", "rejected"):
        if (theirs := entry.pop(f"field_{ours}", None)) not in (None, ours):
            columns[ours] = theirs
    mapping = values.mapping(entry.pop("message_property_mappings", None))
    for ours, standard in (("role", ("role", "from")), ("content", ("content", "value"))):
        theirs = entry.pop(f"message_field_{ours}", None) or mapping.get(ours)
        if theirs not in (None, *standard):
            columns[ours] = theirs
    given = values.mapping(entry.pop("roles", None))
    roles = {
        str(theirs): str(ours)
        for ours, those in given.items()
        for theirs in (those if isinstance(those, list) else [those])
        if theirs != ours and theirs not in KNOWN_ROLES
    }
    trained = entry.pop("roles_to_train", None)
    if trained not in (None, [], ["assistant"], ["gpt"], ["assistant", "gpt"]):
        draft.warn(f"roles_to_train: {trained}; here the answers of the assistant are learned, or data.loss_on: all.")
    entry.pop("message_field_training", None)
    entry.pop("message_field_training_detail", None)
    return result | ({"columns": columns} if columns else {}) | ({"roles": roles} if roles else {})
