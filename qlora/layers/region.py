"""A region of the forward that is computed again in the backward, with or without its attention."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from qlora.layers.states import SameDocuments
from qlora.lora import RecomputedWeights

# By name, because not every version of torch has all of them.
KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "qlora::causal_attention",
}


def recomputed(
    function: Callable[..., Any], *inputs: Any, keep_attention: bool = False, keep_weights: bool = True
) -> Any:
    """Call a function and save only its inputs for the backward.

    The checkpointing is not reentrant: recomputation stops after the last tensor that the backward needs, and regions
    may be nested.

    Args:
        function: The function. Tensors that it does not get as inputs are not saved for it.
        inputs: Its arguments.
        keep_attention: Also save the outputs of attention kernels, which are then not called again.
        keep_weights: Whether weights that are dequantized for the recomputation are kept for the backward that follows;
            otherwise they are dequantized again.
    """
    contexts = partial(_contexts, keep_attention, keep_weights)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(
    keep_attention: bool, keep_weights: bool
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a region's forward and of its recomputation."""
    forward, again = _attention_kept() if keep_attention else (nullcontext(), nullcontext())
    return forward, _Both(again, SameDocuments(), RecomputedWeights() if keep_weights else nullcontext())


class _Both(AbstractContextManager[None]):
    """Contexts that can be entered more than once."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self._contexts, self._entered = contexts, ExitStack()

    def __enter__(self) -> None:
        for context in self._contexts:
            self._entered.enter_context(context)

    def __exit__(self, *error: Any) -> None:
        self._entered.close()


def _attention_kept() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts for a forward and its recomputation, which gets the kernels' results instead of calling them.

    torch's own selective checkpointing requires that the recomputation calls no operation more often than the forward
    did. Ours may: in a thread's first backward, it allocates memory for dequantized weights.
    """
    results: list[Any] = []
    return _Keep(results), _Give(results)


class _Keep(TorchDispatchMode):
    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self._results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if _is_kept(func, args, kwargs):
            self._results.append(_detach(result))
        return result


class _Give(TorchDispatchMode):
    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self._results, self._num_given = results, 0

    def __enter__(self) -> "_Give":
        self._num_given = 0  # a retained graph is recomputed more than once
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(func, args, kwargs):
            return func(*args, **kwargs or {})
        result = self._results[self._num_given]
        self._num_given += 1
        return _detach(result)


def _is_kept(func: Any, args: Any, kwargs: Any) -> bool:
    if func.name() not in KERNELS:
        return False
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
    # A kernel with dropout draws from the device's generator, whose state must advance in the recomputation too.
    return not given.get("dropout_p")


def _detach(result: Any) -> Any:
    # Autograd links a kernel's result to its graph; saved with that link, the two would keep each other alive.
    return tree_map_only(torch.Tensor, torch.Tensor.detach, result)
