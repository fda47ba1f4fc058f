"""A run's adapter as rows of the model card."""

from qlora.config import LoraSection
from qlora.config.sections.objectives import KeepSection

KINDS = {"lora": "LoRA", "dora": "DoRA"}


def adapter_rows(
    lora: LoraSection,
    keep: KeepSection | None = None,
    mean_rank: float | None = None,
    start: str | None = None,
    old_task: str | None = None,
) -> dict[str, str]:
    """Return what a card says about an adapter, by the names of its rows.

    Args:
        lora: LoRA section of the run's config.
        keep: What kept the model close to its base.
        mean_rank: Mean rank that the adapter ended with, if it was reduced.
        start: Public name of the adapter that it started from.
        old_task: Public name of the file whose inputs it does not see.
    """
    rows = {
        "adapter": _size(lora, mean_rank),
        "initial values": _initial_values(lora),
        "trained factors": "B alone, on a fixed projection A" if lora.train == "B" else "",
        "started from": "" if start is None else f"{start}, {'kept below it' if lora.stack else 'trained further'}",
        "adapted layers": _layers(lora),
        "kept close to the base": _kept(keep, old_task),
    }
    return {name: value for name, value in rows.items() if value}


def _size(lora: LoraSection, mean_rank: float | None) -> str:
    if lora.kind == "rows":
        own = f"; by layer: {lora.rank_pattern}" if lora.rank_pattern else ""
        return f"{lora.rank} rows of each weight, dropout {lora.dropout:g}{own}"
    reduced = "" if mean_rank is None else f" reduced to {mean_rank:.4g} on average"
    patterns = {"ranks": lora.rank_pattern, "alphas": lora.alpha_pattern}
    own = "".join(f"; {name} by layer: {pattern}" for name, pattern in patterns.items() if pattern)
    return (
        f"{KINDS[lora.kind]}, rank {lora.rank}{reduced}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, rsLoRA: "
        f"{lora.rslora}{own}"
    )


def _initial_values(lora: LoraSection) -> str:
    if lora.kind == "rows" or (lora.start_from is not None and not lora.stack):
        return ""
    return f"{lora.init}{', weighed by inputs of training examples' if lora.calibrate else ''}"


def _layers(lora: LoraSection) -> str:
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    chosen = "" if lora.layers is None else f" in decoder layers {', '.join(map(str, lora.layers))}"
    without = f", without {', '.join(lora.exclude)}" if lora.exclude else ""
    return f"{targets}{chosen}{without}"


def _kept(keep: KeepSection | None, old_task: str | None) -> str:
    if keep is None:
        return ""
    parts = {
        f"KL divergence from it × {keep.kl:g}": keep.kl > 0,
        f"no update by the main directions of the inputs from {old_task}": keep.null_space is not None,
    }
    return "; ".join(part for part, is_on in parts.items() if is_on)
