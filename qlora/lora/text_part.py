"""The text part of a multimodal model: the modules that text passes, which alone are built and trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class TextPart:
    """What the text part of a multimodal model knows about its place in the whole.

    Attributes:
        text_model: Name of the module that computes the hidden states of text.
        others: Names of the modules of each other part, such as `model.visual`, by its name. Most parts are left out;
            one that text passes on its way to the text model is there, but not trained.
    """

    text_model: str
    others: Mapping[str, Sequence[str]]

    def is_outside(self, name: str) -> bool:
        """Return whether a module is in another part."""
        return f"{name}.".startswith(tuple(f"{part}." for part in self.others))


def text_part(model: nn.Module) -> TextPart | None:
    """Return the text part of a multimodal model; None for a model of text alone."""
    return getattr(model, "text_part", None)


def text_model(model: Any) -> Any:
    """Return the module that computes a model's last hidden states from ids of text."""
    part = text_part(model)
    return model.base_model if part is None else model.get_submodule(part.text_model)
