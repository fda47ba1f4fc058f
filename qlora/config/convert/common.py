"""Translation of keys that all trainers share: optimizers, sizes, paths and trackers."""

from collections.abc import Mapping
from typing import Any

from qlora.config.convert import values
from qlora.config.convert.adapters import translate_adapters
from qlora.config.convert.base_model import translate_base
from qlora.config.convert.draft import OFF, Draft
from qlora.config.convert.evaluation import translate_evaluation
from qlora.config.convert.names import NAMES, SAME_NAMES
from qlora.config.convert.steps import translate_steps

# Keys whose value is copied as a number.
NUMBERS = {
    "lora.rank", "lora.alpha", "lora.dropout", "data.max_rows", "data.max_seq_len", "train.epochs",
    "train.micro_batch_size", "train.gradient_accumulation_steps", "train.learning_rate", "train.weight_decay",
    "train.seed", "train.keep_checkpoints",
}  # fmt: skip
# Keys whose value is copied as true or false.
FLAGS = {"lora.rslora", "model.trust_remote_code", "data.deduplicate", "train.deterministic"}


def translate_common(draft: Draft, is_full: bool = False) -> None:
    """Translate the keys that mean the same in every trainer.

    Args:
        draft: Peer-specific keys are taken from it before.
        is_full: Whether the other config trains all weights.
    """
    if is_full:
        draft.warn(
            "It asks for full fine-tuning. qlora trains adapters on a frozen base; a learning rate for adapters is "
            "usually ten times that of full fine-tuning."
        )
    translate_adapters(draft)
    translate_base(draft)
    _optimizer(draft)
    _copy(draft)
    _trackers(draft)
    translate_steps(draft)
    translate_evaluation(draft)


def hold_out(draft: Draft, size: Any, name: str) -> None:
    """Translate a share of the rows, or a number of rows, that is held out for evaluation."""
    share = values.number(size)
    if share is None or not share or "data.eval" in draft.values:  # a test set of its own wins
        return
    if share < 1:
        draft.set("data.eval", float(share), name)
    else:
        draft.set("data.eval", 0.02, f"{name}: {share}, see above")
        draft.warn(f"{name}: {share} is a number of rows; data.eval takes a share. It is set to 0.02.")


def set_template(draft: Draft, name: Any, key: str) -> None:
    """Translate the name of a chat template, or keep one that is written out."""
    if name in OFF:
        return
    text = str(name)
    ours = values.template(text)
    if "{%" in text or "{{" in text:
        draft.template = text
    elif ours is not None:
        draft.set("data.chat_template", ours, f"{key}: {text}")
    elif text.endswith((".jinja", ".jinja2", ".j2")):
        draft.set("data.chat_template", text, key)
    else:
        draft.set("data.chat_template", "auto", f"{key}: {text}, see above")
        draft.warn(
            f"{key}: {text} has no counterpart by name. data.chat_template: auto takes the base's own template; a "
            "jinja file is accepted, too."
        )


def _optimizer(draft: Draft) -> None:
    key, name = draft.take_named("optimizer", "optim")
    if name not in OFF:
        ours = values.optimizer(name)
        draft.set("train.optimizer", ours or "paged_adamw_8bit", f"{key}: {name}{'' if ours else ', see above'}")
        if ours is None:
            draft.warn(
                f"The optimizer {name} is not available; train.optimizer is paged_adamw_8bit, which may need another "
                "learning rate."
            )
    betas = [values.number(draft.take(name)) for name in ("adam_beta1", "adam_beta2")]
    if any(beta is not None for beta in betas):
        pair = [default if beta is None else beta for beta, default in zip(betas, (0.9, 0.999), strict=True)]
        draft.set("train.betas", pair, "adam_beta1, adam_beta2")
    norm = values.number(draft.take("max_grad_norm"))
    if norm is not None:
        draft.set("train.max_grad_norm", norm or None, "max_grad_norm")


def _copy(draft: Draft) -> None:
    """Translate keys whose values are copied: paths, numbers, booleans."""
    logging = values.number(draft.take("logging_steps"))
    if logging is not None and logging >= 1:
        draft.set("train.log_every", int(logging), "logging_steps")
    name, alpha = draft.take_named("neftune_noise_alpha", "noisy_embedding_alpha")
    if values.number(alpha):
        draft.set("train.neftune_alpha", values.number(alpha), name)
    if smoothing := values.number(draft.take("label_smoothing_factor")):
        draft.set("train.label_smoothing", smoothing, "label_smoothing_factor")
    name, is_dft = draft.take_named("use_dft", "use_dft_loss")
    if values.flag(is_dft):
        draft.set("train.token_loss", "dft", name)
    _packing(draft)
    names = ("tokens", "added_tokens", "new_special_tokens", "add_special_tokens", "add_tokens")
    tokens = draft.peek(*names)
    if values.names(tokens):
        draft.set("data.new_tokens", values.names(tokens), draft.take_named(*names)[0])
    elif isinstance(tokens, dict):
        draft.drop("tokens", "special tokens are read from the base's tokenizer")
    _ends_and_rates(draft)
    overlong = draft.take("excess_length_strategy", "truncation_mode")
    if overlong is not None:
        draft.set("data.overlong", values.OVERLONG.get(str(overlong), "truncate"), f"excess length: {overlong}")
    for name, value in draft.left():
        key = SAME_NAMES.get(name) or NAMES.get(name)
        if key is None or value in (None, ""):
            continue
        if key in NUMBERS and (found := values.number(value)) is not None:
            draft.set(key, found, name)
            draft.take(name)
        elif key in FLAGS:
            draft.set(key, bool(values.flag(value)), name)
            draft.take(name)
            if key == "model.trust_remote_code" and values.flag(value):
                draft.warn(
                    "trust_remote_code: true runs Python code that comes with the base; keep it if you trust it."
                )
        elif key in ("model.base", "model.revision", "train.output_dir", "data.cache_dir") and isinstance(value, str):
            draft.set(key, value, name)
            draft.take(name)


def _ends_and_rates(draft: Draft) -> None:
    """Translate the end token, and learning rates of groups of parameters."""
    special = draft.peek("special_tokens")
    end = special.get("eos_token") if isinstance(special, dict) else None
    if isinstance(end, str) and end:
        draft.take("special_tokens")
        draft.set("data.special_tokens", {"eos_token": end}, "special_tokens")
    if isinstance(special, dict):
        added = values.names(special.get("additional_special_tokens"))
        if added:
            draft.take("special_tokens")
            draft.set("data.new_tokens", added, "special_tokens: additional_special_tokens")
        for name in special.keys() - {"eos_token", "additional_special_tokens"} if end or added else ():
            draft.dropped[f"special_tokens.{name}"] = "the base's tokenizer has its own"
    _group_rates(draft)


def _group_rates(draft: Draft) -> None:
    """Translate learning rates of LoRA+ and of embeddings."""
    rates: dict[str, float | str] = {}
    name, ratio = draft.take_named("loraplus_lr_ratio")
    if ratio is not None and (factor := values.number(ratio)):
        rates["lora_B"] = f"{factor:g}x"
    key, rate = draft.take_named("embedding_learning_rate", "embedding_lr", "loraplus_lr_embedding")
    scale_key, scale = draft.take_named("embedding_lr_scale")
    if rate is None and scale is not None:
        key, rate = scale_key, scale
    if rate is not None and not draft.values.keys() & {"lora.modules_to_save", "data.new_tokens"}:
        draft.drop(key, "no embedding or head is trained")
    elif (number := values.number(rate)) and rate is not None:
        rates["embeddings"] = f"{number:g}x" if key == "embedding_lr_scale" else number
    if rates:
        draft.set("train.learning_rates", rates, ", ".join(filter(None, [name if ratio else "", key if rate else ""])))


def _packing(draft: Draft) -> None:
    name, packing = draft.take_named("sample_packing", "neat_packing", "packing")
    if (flag := values.flag(packing)) is not None:
        # Nothing there refuses to pack; here true would, if the base can't keep documents apart.
        draft.set("data.packing", "auto" if flag else False, name)


def _trackers(draft: Draft) -> None:
    found = [name for name in values.names(draft.take("report_to")) if name.lower() not in ("none", "all", "null")]
    for tracker in ("wandb", "tensorboard", "mlflow"):
        switches = [draft.take(f"use_{tracker}"), draft.take(f"enable_{tracker}")]
        if any(map(values.flag, switches)):
            found.append(tracker)
    if draft.peek("wandb_project") not in OFF and not found and draft.trainer == "axolotl":
        found.append("wandb")
    if found:
        draft.set("train.trackers", list(dict.fromkeys(found)), "report_to")
        draft.warn(
            f"train.trackers: {', '.join(dict.fromkeys(found))} must be installed (pip install …); to train without, "
            "set train.trackers: []."
        )


def flatten(given: Mapping[str, Any], keep: set[str]) -> dict[str, Any]:
    """Return the leaves of nested groups by their own names; `keep` names mappings that are values."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict) and name not in keep:
            flat |= flatten(value, keep)
        else:
            flat[str(name)] = value
    return flat
