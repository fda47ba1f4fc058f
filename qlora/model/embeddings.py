"""Input embeddings changed for a while, between their lookup and the first layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora.errors import ModelError


@contextmanager
def changed_embeddings(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replace the input embeddings of forward passes that get a gradient; others, such as evaluations, are not changed.

    Contexts can be nested: the changes are made in the order in which the contexts were entered.

    Args:
        model: A causal language model of transformers.
        change: Maps embedded tokens, (batch, seq, features), to a tensor of the same shape and dtype. The embedding's
            own scale, as in Gemma, is already applied.

    Raises:
        ModelError: The model embedded nothing, so the change had no effect.
    """
    was_called = False

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal was_called
        was_called = True
        return change(output) if torch.is_grad_enabled() else output

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not was_called:
        raise ModelError(
            f"{type(model).__name__} does not call its input embeddings as a module, so they can't be changed; remove "
            "train.neftune_alpha and train.adversarial."
        )
