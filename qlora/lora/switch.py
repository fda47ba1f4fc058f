"""Adapters switched off or back to their start for a while: what a model is compared with, without a second copy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from qlora.errors import ModelError
from qlora.lora.experts import LoraExperts
from qlora.lora.linear import LoraLinear
from qlora.lora.rows import EmbeddingRows

Part = LoraLinear | LoraExperts | EmbeddingRows


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
    parts = _parts(model)
    if any(isinstance(part, EmbeddingRows) and part.is_whole for part in parts):
        raise ModelError(
            "The adapters can't be switched off: embedding or head are trained in full, and the model does not hold "
            "the base's rows. Leave lora.modules_to_save empty, or load the base a second time."
        )
    with _set(parts, "is_off"):
        yield


@contextmanager
def adapters_at_start(model: nn.Module) -> Iterator[None]:
    """Make a model compute exactly what it did at step 0 of its run; on exit it is restored.

    Where the update was zero at first, the adapters are off. Otherwise their initial values are used, which
    :func:`qlora.lora.keep_starts` keeps. Like :func:`adapters_off` it draws no dropout, can be nested, and must not
    enclose a backward pass.

    Args:
        model: A model with adapters whose initial values are kept.

    Raises:
        ModelError: A bias is trained, whose initial value is not kept.
    """
    parts = _parts(model)
    if any(isinstance(part, EmbeddingRows) and part.bias is not None for part in parts):
        raise ModelError("The model can't be set back to its start: its head has a trained bias, which is not kept.")
    with _set(parts, "is_at_start"):
        yield


def _parts(model: nn.Module) -> list[Part]:
    return [module for module in model.modules() if isinstance(module, Part)]


@contextmanager
def _set(parts: Sequence[Part], name: str) -> Iterator[None]:
    """Set an attribute of parts to True, and restore it on exit."""
    before = [getattr(part, name) for part in parts]
    for part in parts:
        setattr(part, name, True)
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            setattr(part, name, value)
