"""Layers by the names that users write: full names, last parts of names, or regular expressions."""

import difflib
import re
from collections.abc import Sequence

from torch import nn

from qlora.lora.text_part import text_part


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern is a layer's name, the last parts of it, or a regular expression for all of it."""
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def other_part(model: nn.Module, pattern: str) -> str | None:
    """Return which other part of a multimodal model a pattern is for, for messages; None if it is for none.

    Args:
        model: The text part of the model.
        pattern: The pattern.
    """
    text = text_part(model)
    if text is None:
        return None
    for part, names in text.others.items():
        if any(matches(pattern, name) for name in names):
            return f"{part}, which is not trained: only {text.text_model} is"
    return None


def unmatched(key: str, pattern: str, model: nn.Module, linears: Sequence[str], purpose: str) -> str:
    """Return the message about a pattern that matches no linear layer, with the nearest name.

    Args:
        key: Key of the config that has the pattern.
        pattern: The pattern.
        model: The model.
        linears: Names of its linear layers.
        purpose: What only linear layers can be: `adapted`.
    """
    parts = sorted({name.rpartition(".")[2] for name in linears})
    other = other_part(model, pattern)
    if other is not None:
        return f"{key}: '{pattern}' is in {other}. Its linear layers are: {', '.join(parts)}."
    others = [name for name, _ in model.named_modules() if name and matches(pattern, name)]
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        return f"{key}: '{pattern}' is {others[0]}, a {kind}; only linear layers can be {purpose}."
    near = difflib.get_close_matches(pattern, [*parts, *linears], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{key}: '{pattern}' matches no linear layer.{hint} This model has: {', '.join(parts)}."
