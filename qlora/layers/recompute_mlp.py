"""A gated MLP that is computed again in the backward, as a whole or in tiles of tokens."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from qlora.kernels import Recipe, recipe_of, save_first
from qlora.layers.rebuild import GatedMLP
from qlora.layers.region import recomputed

# Each tile dequantizes the weights again, which takes 4% of the time at 4,096 tokens. A tile of an 8B model works on
# 0.7 GB, as much as the rest of the layer for 10,000 tokens.
TILE_TOKENS = 4096

Build = Callable[..., torch.Tensor]


def recompute_mlp(mlp: GatedMLP, x: torch.Tensor) -> torch.Tensor:
    """Call an MLP that saves x, or the inputs of its `recipe`, instead of the outputs of its projections.

    Args:
        mlp: An MLP that treats each token by itself.
        x: (…, hidden).

    Returns:
        (…, hidden).
    """
    build, origin = _origin(x)
    has_recipe, needs_grad, given = recipe_of(x) is not None, x.requires_grad, [x]

    def compute(*inputs: torch.Tensor) -> torch.Tensor:
        if given:  # the forward
            return mlp.compute(given.pop())
        again = _build_again(build, inputs, needs_grad)
        if has_recipe:
            again.recipe = Recipe(build, inputs, again._version)  # type: ignore[attr-defined]
        return mlp.compute(again)

    return recomputed(compute, *origin)


def tile_mlp(mlp: GatedMLP, x: torch.Tensor, num_tokens: int = TILE_TOKENS) -> torch.Tensor:
    """Call an MLP tile by tile, in the backward too, so that only one tile's activations exist at a time.

    The inputs of all tiles are saved before the first one is computed. The recomputation of the surrounding layer stops
    there, so each tile is computed twice instead of three times, except with torch 2.11, which saves a tensor before
    each tile.

    Args:
        mlp: An MLP that treats each token by itself.
        x: (…, hidden).
        num_tokens: Tokens of a tile.

    Returns:
        (…, hidden).
    """
    rows = x.flatten(0, -2)
    if len(rows) <= num_tokens:
        return mlp.compute(x)
    build, origin = _origin(x)
    # Saved with the inputs so that there is a graph node to save them in, whether or not x needs a gradient.
    parameters = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    starts = range(0, len(rows), num_tokens)
    saved: Any = save_first(*(tensor.flatten(0, -2) for tensor in origin), *parameters)
    # Once for all tiles: in the recomputation of a layer, a saved tensor can be unpacked only once. Through the tensor,
    # without which torch 2.11 frees what its node has saved.
    inputs = cache(lambda: saved.grad_fn.saved_tensors[: len(origin)])
    # Split once: the gradient of a slice would be as long as all rows.
    parts = zip(rows.split(num_tokens), starts, strict=True)
    tiles = [_tile(mlp, part, start, build, inputs) for part, start in parts]
    return torch.cat(tiles).view(*x.shape[:-1], -1)


def _tile(
    mlp: GatedMLP, x: torch.Tensor, start: int, build: Build, inputs: Callable[[], tuple[torch.Tensor, ...]]
) -> torch.Tensor:
    part, needs_grad, given = slice(start, start + len(x)), x.requires_grad, [x]

    def compute() -> torch.Tensor:
        if given:  # the forward
            return mlp.compute(given.pop())
        return mlp.compute(_build_again(build, [tensor[part] for tensor in inputs()], needs_grad))

    return recomputed(compute)


def _origin(x: torch.Tensor) -> tuple[Build, tuple[torch.Tensor, ...]]:
    """Return the function that builds x, and its inputs."""
    recipe = recipe_of(x)
    return (_same, (x,)) if recipe is None else (recipe.source.function, recipe.inputs)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _build_again(build: Build, inputs: Sequence[torch.Tensor], needs_grad: bool) -> torch.Tensor:
    """Rebuild x in a recomputation, without a graph: the forward has made it, outside of the region."""
    with torch.no_grad():
        x = build(*inputs)
    return x.detach().requires_grad_(needs_grad)
