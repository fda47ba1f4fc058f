"""Adapters switched off for a while, so that the model computes what its base computes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qlora.errors import ModelError
from qlora.lora.linear import LoraLinear
from qlora.lora.rows import EmbeddingRows


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Make a model compute exactly what its base computes, without a second copy; on exit it is restored.

    Rows of new tokens that the base does not have keep their initial value, the mean of the rows before them. No
    dropout is drawn, so the random numbers of training do not change. Contexts can be nested. Run backward passes of
    the adapted model outside of the context: activation checkpointing recomputes their forward in the
    model's current state.

    Args:
        model: A model with adapters; without any, nothing changes.

    Raises:
        ModelError: Embedding or head are trained in full, so the model no longer holds the base's.
    """
    parts = [module for module in model.modules() if isinstance(module, LoraLinear | EmbeddingRows)]
    if any(isinstance(part, EmbeddingRows) and part.is_whole for part in parts):
        raise ModelError(
            "The adapters can't be switched off: embedding or head are trained in full, and the model does not hold "
            "the base's rows. Leave lora.modules_to_save empty, or load the base a second time."
        )
    before = [part.is_off for part in parts]
    for part in parts:
        part.is_off = True
    try:
        yield
    finally:
        for part, was_off in zip(parts, before, strict=True):
            part.is_off = was_off
