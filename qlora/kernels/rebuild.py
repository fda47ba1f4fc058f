"""Tensors that are cheap to compute: built again in the backward pass instead of being kept for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Recipe:
    """How a tensor is built again, for whoever would otherwise keep it.

    The inputs belong into `save_for_backward` of whoever uses the recipe, where hooks that offload or recompute see
    them; what remains holds no tensor but, within a backward pass, the one that several users ask for.

    Attributes:
        inputs: That the tensor is built from. Only there in the forward pass.
        source: What builds it.
        version: Of the tensor: one that was changed in place since is not what the recipe gives.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], version: int) -> None:
        self.inputs, self.source, self.version = inputs, Source(function), version


class Source:
    """A function of a recipe's inputs, whose result is kept until all its users have had it.

    Attributes:
        function: That builds the tensor.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self._num_users = self._num_left = 0
        self._built: torch.Tensor | None = None

    def add_user(self) -> "Source":
        """Counts one more who will ask."""
        self._num_users += 1
        return self

    def build(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The tensor, for one of the users."""
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
    """Calls a function whose result need not be kept: it gets the recipe for it as its attribute `recipe`.

    The function's backward keeps the inputs alone. It calls the function's method `gradients(grad_output, *inputs)`,
    which gives the gradient of each input, or runs a function without one again under autograd. An operation in between
    that gives a new tensor loses the recipe, and so nothing but the saving.

    Args:
        function: Without randomness and without parameters that are trained.
        inputs: Its arguments.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    result = _Rebuilt.apply(function, *inputs)
    # With these gradients for whoever runs the recipe under autograd, as the loss does with the last norm.
    result.recipe = Recipe(partial(_Rebuilt.apply, function), inputs, result._version)
    return result


def recipe_of(tensor: torch.Tensor) -> Recipe | None:
    """The recipe of a tensor, if it has one and is still what that gives."""
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
