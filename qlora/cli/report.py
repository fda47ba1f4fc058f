"""Reports on the screen: aligned lines for people, or one JSON object for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Labels of values whose keys don't read well by themselves.
LABELS = {
    "adapter": "adapter SHA-256",
    "adapter_loss": "loss with the adapter",
    "base_bytes": "size of the base",
    "continued_bytes": "written by an interrupted merge",
    "greedy_agreement": "greedy answers equal for",
    "layers_checked": "layers compared",
    "losses": "loss, first and last step",
    "eval_losses": "held-out loss",
    "seconds": "time",
    "answered": "rows answered",
    "answer_seconds": "time for answers",
    "recompute": "activation checkpointing",
    "unpacked_why": "not packed, because",
    "weights_kept": "weights cached",
    "micro_batch_parts": "parts of a micro-batch",
    "tiled": "MLP in tiles",
    "max_layer_difference": "largest difference of a layer's output",
    "max_logit_difference": "largest difference of a logit",
    "max_weight_difference": "largest difference of a weight",
    "mean_kl": "mean KL divergence (nats)",
    "mean_logit_difference": "mean difference of logits",
    "merged": "layers merged",
    "merged_loss": "loss of the merged model",
    "num_bytes": "size",
    "out_dir": "folder",
    "positions": "positions compared",
    "quantized": "layers quantized",
    "run_dir": "run",
    "tensors_checked": "tensors compared",
    "top1_agreement": "same most likely token",
}
# Values whose reason has another name than theirs with _why.
REASONS = {"optimizer_state_paged": "optimizer_state_why"}
SIZES = ("memory", "available", "estimated", "measured", "size")
SHARES = ("_share", "_agreement", "_fill")
UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "bytes": 1}


def show_report(values: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """Print a report on standard output.

    For people, empty values are left out, sizes and numbers have units, a value's reason follows it in parentheses, and
    notes are on lines of their own.

    Args:
        values: The report.
        as_json: Print one JSON object with all values as they are.
        title: Lines before the values, for people.
    """
    if as_json:
        print(as_json_text(values))
        return
    if title:
        print(title)
    printed = {key: value for key, value in values.items() if key != "notes" and _is_printed(value)}
    reasons = {key: REASONS.get(key, f"{key}_why") for key in printed}
    shown = {
        _label(key): format_value(key, value) + (f" ({printed[reasons[key]]})" if reasons[key] in printed else "")
        for key, value in printed.items()
        if key not in reasons.values() and (key, value) != ("continued_bytes", 0)
    }
    width = max(map(len, shown), default=0)
    for label, text in shown.items():
        print(f"  {label:<{width}}  {text}".replace("\n", "\n" + " " * (width + 4)))
    for note in values.get("notes", ()):
        print(f"  {note}" if note.startswith("Next: ") else f"  note: {note}")


def as_json_text(values: Mapping[str, Any]) -> str:
    """Return a report as one JSON object; JSON has no numbers that are not finite, so these are null."""
    return json.dumps(_finite(values), default=str, allow_nan=False)


def format_size(num_bytes: float) -> str:
    """Return a number of bytes as text in the largest unit of which it has at least one."""
    unit = next((name for name, size in UNITS.items() if num_bytes >= size), "bytes")
    return f"{num_bytes / UNITS[unit]:,.{0 if unit == 'bytes' else 2}f} {unit}"


def format_value(key: str, value: Any) -> str:
    """Return a value of a report as text for people; the unit follows from its key."""
    if isinstance(value, Mapping):
        shown = {
            _label(str(name)): format_value("num_bytes" if key == "by_kind" else str(name), item)
            for name, item in value.items()
            if _is_printed(item)
        }
        return ", ".join(f"{label}: {text}" for label, text in shown.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(format_value(key, item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if key.endswith(("_bytes", *SIZES)):
        return format_size(value)
    if key.endswith(SHARES):
        return f"{value:.1%}"
    if key in ("seconds", "answer_seconds"):
        return f"{value:,.1f} s"
    if key.endswith("_per_second"):
        return f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _finite(value: Any) -> Any:
    """Return a value with null in place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _label(key: str) -> str:
    return LABELS.get(key) or key.removesuffix("_bytes").replace("_", " ")


def _is_printed(value: Any) -> bool:
    """Return whether a value is printed: zeros are, None and empty collections are not."""
    return value is not None and value != [] and value != {} and value != ""
