"""A gated MLP that is computed again in the backward: whole, or in tiles over its tokens."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from qlora.kernels import Recipe, recipe_of, save_first
from qlora.layers.rebuild import GatedMLP
from qlora.layers.region import recomputed

# Each tile dequantizes the weights anew: at 4,096 tokens that is 4% of the time. A tile of a model of 8 billion
# parameters works on 0.7 GB, as much as the rest of its layer does for 10,000 tokens.
TILE_TOKENS = 4096

Build = Callable[..., torch.Tensor]


def recompute_mlp(mlp: GatedMLP, x: torch.Tensor) -> torch.Tensor:
    """Calls an MLP, of which x is kept, or what its `recipe` builds it from: what its projections give is not.

    Args:
        mlp: Of each token for itself.
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
    """Calls an MLP tile by tile, in the backward again, so that one tile's activations are there at a time.

    What the tiles are built from is saved before the first one is computed. The recomputation of a layer around them
    stops there, so that each tile is computed twice and not three times; but for torch 2.11, which saves something
    before each tile.

    Args:
        mlp: Of each token for itself.
        x: (…, hidden).
        num_tokens: Of a tile.

    Returns:
        (…, hidden).
    """
    rows = x.flatten(0, -2)
    if len(rows) <= num_tokens:
        return mlp.compute(x)
    build, origin = _origin(x)
    # Saved with the others so that there is a graph to save them in, whether or not x needs a gradient.
    parameters = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    starts = range(0, len(rows), num_tokens)
    saved: Any = save_first(*(tensor.flatten(0, -2) for tensor in origin), *parameters)
    # Once for all tiles: in the recomputation of a layer, a saved tensor can be unpacked only once. By the
    # tensor, without which torch 2.11 lets go of what its node has saved.
    inputs = cache(lambda: saved.grad_fn.saved_tensors[: len(origin)])
    # Split at once: the gradient of a slice is as long as all rows.
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
    """What builds x, and what of."""
    recipe = recipe_of(x)
    return (_same, (x,)) if recipe is None else (recipe.source.function, recipe.inputs)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _build_again(build: Build, inputs: Sequence[torch.Tensor], needs_grad: bool) -> torch.Tensor:
    """x in a recomputation. Its graph is that of the forward, outside of the region, so that none is made here."""
    with torch.no_grad():
        x = build(*inputs)
    return x.detach().requires_grad_(needs_grad)
