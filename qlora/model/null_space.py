"""Adapters that do not see the inputs of an older task (LoRA-Null, arXiv:2503.02659)."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from qlora.data import TokenizedExample
from qlora.errors import ModelError
from qlora.lora import InputStatistics, LayerStart, apply_starts, lora_layers
from qlora.model.observe import observe
from qlora.model.starts import Starts

# The main directions of a layer's inputs are hidden up to this share of their mean square, and up to a share of all.
# In a small model, half of the features have 81 to 93% of it; a quarter forgets more at equal loss on the new task, and
# three quarters learn less and forget no less (docs/benchmarks/methods.md).
ENERGY = 0.99
MOST_OF_FEATURES = 0.5
# No more than these; a quarter of the directions that statistics are kept in, which are accurate so far.
MOST_DIRECTIONS = 64


def check_no_experts(experts: Collection[str]) -> None:
    """Check that inputs are hidden from every adapter; those of experts can't hide any.

    Args:
        experts: Names of the adapted stacks of experts.

    Raises:
        ModelError: There are some.
    """
    if experts:
        raise ModelError(
            f"train.keep.null_space hides inputs from adapters of linear layers only, but {len(experts)} stacks of "
            f"experts have adapters too, such as {next(iter(experts))}; set lora.expert_rank: 0, or use train.keep.kl."
        )


@torch.no_grad()
def hide_inputs(model: Any, starts: Starts, examples: Sequence[TokenizedExample]) -> Starts:
    """Hide the main directions of the inputs that layers get from examples from the factors A of the adapters.

    Args:
        model: Model with adapters, in evaluation mode.
        starts: What the adapters start from.
        examples: Examples of the older task.

    Returns:
        The starts with the directions, which are set in the model too.
    """
    names = [name for name, _ in lora_layers(model)]
    statistics = observe(model, names, "train.keep.null_space", examples, 4 * MOST_DIRECTIONS)
    spaces = {id(one): main_directions(one) for one in statistics.values()}  # shared by layers with the same inputs
    hidden = {
        name: replace(starts.get(name, LayerStart()), null_space=spaces[id(one)]) for name, one in statistics.items()
    }
    apply_starts(model, hidden)
    return {**starts, **hidden}


def main_directions(statistics: InputStatistics) -> torch.Tensor:
    """Return the fewest orthonormal directions with the share `ENERGY` of the inputs' mean square, (in, directions)."""
    most = min(MOST_DIRECTIONS, int(MOST_OF_FEATURES * statistics.in_features))
    directions, shares = statistics.top_directions(max(1, most))
    enough = int((shares.cumsum(0) < ENERGY).sum()) + 1
    return directions[:, :enough].contiguous()
