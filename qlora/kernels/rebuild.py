"""Cheap tensors that are rebuilt in the backward pass instead of being saved for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Recipe:
    """How to rebuild a tensor, for operations that would otherwise save it.

    An operation that uses the recipe puts the inputs into its own `save_for_backward`, where hooks that offload or
    recompute see them. The source itself holds no tensor except, within a backward pass, one that several users share.

    Attributes:
        inputs: The tensors that it is built from; available in the forward pass only.
        source: The function that builds it.
        version: Version of the tensor. If it was changed in place since, the recipe no longer describes it.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], version: int) -> None:
        self.inputs, self.source, self.version = inputs, Source(function), version


class Source:
    """A function of a recipe's inputs, whose result is kept until all its users have taken it.

    Attributes:
        function: Builds the tensor from the inputs.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self._num_users = self._num_left = 0
        self._built: torch.Tensor | None = None

    def add_user(self) -> "Source":
        """Count one more user, and return the source."""
        self._num_users += 1
        return self

    def build(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the tensor to one of the users."""
        if self._built is None:
            with torch.no_grad():
                self._built = self.function(*inputs)
            self._num_left = self._num_users
        built = self._built
        self._num_left -= 1
        if self._num_left <= 0:
            self._built = None
        return built


def rebuilt(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Call a function whose result need not be saved; the result has its recipe as the attribute `recipe`.

    The backward saves the inputs alone. It calls the function's method `gradients(grad_output, *inputs)`, which returns
    the gradient of each input, or without one runs the function again under autograd. An operation in between that
    returns a new tensor drops the recipe; the only loss is the memory.

    Args:
        function: A function without randomness and without trained parameters.
        inputs: Its arguments.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    result = _Rebuilt.apply(function, *inputs)
    # With the same gradients for those who run the recipe under autograd, as the loss does with the last norm.
    result.recipe = Recipe(partial(_Rebuilt.apply, function), inputs, result._version)
    return result


def recipe_of(tensor: torch.Tensor) -> Recipe | None:
    """Return the recipe of a tensor, or None if it has none or was changed in place since."""
    recipe: Recipe | None = getattr(tensor, "recipe", None)
    return recipe if recipe is not None and recipe.version == tensor._version else None


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if hasattr(ctx.function, "gradients"):
            grads = ctx.function.gradients(grad_output, *ctx.saved_tensors)
            return (None, *(grad if need else None for grad, need in zip(grads, needed, strict=True)))
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            result = ctx.function(*inputs)
        asked = [tensor for tensor in inputs if tensor.requires_grad]
        grads = iter(torch.autograd.grad(result, asked, grad_output))
        return (None, *(next(grads) if need else None for need in needed))
