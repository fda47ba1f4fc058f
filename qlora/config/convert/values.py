"""Values of other trainers in ours: optimizers, schedules, dtypes, attention, templates, targets."""

import math
import re
from typing import Any

from qlora.config.plain_yaml import parse_yaml

OPTIMIZERS = {
    "paged_adamw_8bit": "paged_adamw_8bit", "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw": "paged_adamw_32bit",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit",
    "ao_adamw_8bit": "adamw_8bit", "adamw_32bit": "adamw_32bit",
    "adamw": "adamw_32bit", "adamw_torch": "adamw_32bit", "adamw_torch_fused": "adamw_32bit",
    "adamw_hf": "adamw_32bit", "adamw_apex_fused": "adamw_32bit", "adamw_anyprecision": "adamw_32bit",
    "adamw_torch_xla": "adamw_32bit", "adamw_torch_npu_fused": "adamw_32bit", "optimi_adamw": "adamw_32bit",
}  # fmt: skip
# The schedule here, and how it differs from the one of that name.
SCHEDULES = {
    "cosine": ("cosine", ""), "linear": ("linear", ""), "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""), "cosine_with_min_lr": ("cosine", ""),
    "cosine_warmup_with_min_lr": ("cosine", ""), "cosine_with_restarts": ("cosine_restarts", ""),
    "inverse_sqrt": ("inverse_sqrt", ""), "warmup_stable_decay": ("wsd", ""),
    "polynomial": ("linear", "it falls by the power of 1"),
}  # fmt: skip
ATTENTION = {
    "eager": "eager", "sdpa": "sdpa", "flex_attention": "flex_attention", "flex": "flex_attention",
}  # fmt: skip
# Names of chat templates that are named otherwise here.
TEMPLATES = {
    "auto": "auto", "default": "auto", "tokenizer_default": "auto", "none": "auto", "empty": "auto",
    "alpaca": "alpaca", "chatml": "chatml", "chat_ml": "chatml", "zephyr_chatml": "chatml",
    "llama2": "llama2", "llama_2": "llama2", "llama3": "llama3", "llama_3": "llama3",
    "mistral": "mistral", "inst": "mistral", "mistral_v1": "mistral",
    "gemma": "gemma", "gemma2": "gemma", "gemma_2": "gemma", "gemma3": "gemma3", "gemma_3": "gemma3",
    "phi": "phi3", "phi3": "phi3", "phi_3": "phi3", "phi_35": "phi3", "phi4": "phi4", "phi_4": "phi4",
    "qwen": "qwen2.5", "qwen2": "qwen2.5", "qwen25": "qwen2.5", "qwen_25": "qwen2.5", "qwen2_5": "qwen2.5",
    "qwen3": "qwen3", "qwen_3": "qwen3", "qwen3_nothink": "qwen3",
}  # fmt: skip
DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16", "half": "float16",
          "float32": "float32", "fp32": "float32", "float": "float32"}  # fmt: skip
OVERLONG = {"drop": "drop", "truncate": "truncate", "raise": "error", "error": "error", "keep_start": "truncate"}
FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chatml": "messages", "openai": "messages", "raw": "text"}


def optimizer(name: Any) -> str | None:
    """Return our name of an optimizer, or None if there is none."""
    return OPTIMIZERS.get(str(name).rpartition(".")[2].lower())


def schedule(name: Any) -> tuple[str, str] | None:
    """Return our schedule and how it differs, or None if there is none."""
    return SCHEDULES.get(str(name).rpartition(".")[2].lower())


def dtype(name: Any) -> str | None:
    """Return our name of a dtype, or None if it is unknown."""
    return DTYPES.get(str(name).removeprefix("torch.").lower())


def template(name: Any) -> str | None:
    """Return our name of a chat template, or None if there is none of that name."""
    text = str(name).lower()
    text = re.sub(r"^tokenizer_default_fallback_.*", "auto", text)
    return TEMPLATES.get(re.sub(r"[-.]", "_", text)) or TEMPLATES.get(re.sub(r"[-.]", "", text))


def number(value: Any) -> int | float | None:
    """Return a number, also from text such as `2e-4`; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    if not math.isfinite(found):
        return None
    return int(found) if isinstance(value, int) or found.is_integer() and "." not in str(value) else found


def flag(value: Any) -> bool | None:
    """Return a truth value, also from text; None if it is none."""
    if isinstance(value, str):
        value = {"true": True, "yes": True, "false": False, "no": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def names(value: Any) -> list[str]:
    """Return a list of names from a list, or from text with commas or spaces between them."""
    if isinstance(value, str):
        try:
            parsed = parse_yaml(value) if value.startswith("[") else None
        except ValueError:
            parsed = None
        value = parsed if isinstance(parsed, list) else re.split(r"[,\s]+", value.strip())
    return [str(name) for name in value if str(name)] if isinstance(value, list | tuple) else []


def paths(value: Any) -> list[str]:
    """Return a list of paths from a path or a list of them."""
    found = value if isinstance(value, list | tuple) else [value]
    return [path for path in found if isinstance(path, str) and path]


def mapping(value: Any) -> dict[Any, Any]:
    """Return a mapping, empty if the value is none."""
    return value if isinstance(value, dict) else {}
