"""Tensors that a forward keeps for its backward: through `save_for_backward`, and as attributes of ctx."""

from collections.abc import Callable, Iterator
from typing import Any

import torch


def saved_tensors(run: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """Return the result of `run`, and the tensors that autograd saved during it."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, saved


def tensors_on_ctx(grad_fn: Any) -> list[torch.Tensor]:
    """Return tensors that a custom function's ctx refers to, also in modules and containers."""
    return list(_walk(vars(grad_fn), set()))


def _walk(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _walk(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _walk(item, seen)
    elif not isinstance(value, type):
        if hasattr(value, "__dict__"):
            yield from _walk(vars(value), seen)
        for name in getattr(type(value), "__slots__", ()):
            yield from _walk(getattr(value, name, None), seen)
