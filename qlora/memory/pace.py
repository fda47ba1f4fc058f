"""The time of a micro-batch on paper: its products, and the copies of placed weights that they may hide."""

from dataclasses import dataclass

from qlora.memory.cards import Card
from qlora.memory.estimate import Estimate
from qlora.memory.passes import BACKWARD, FORWARD

# Shares of a data sheet's rates that programs reach: assumed, not measured.
FLOPS_SHARE, BUS_SHARE = 0.5, 0.8
# Levels that compute the layers' products again in the backward pass.
RECOMPUTED = ("attention", "full", "offload", "offload+tiled")


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a micro-batch on each GPU.

    Attributes:
        compute: Seconds of the products with the base's weights, without attention and adapters.
        copy: Seconds in which placed weights come to the GPU, at the same time.
        hidden_from: Number of tokens of a micro-batch from which computing takes as long as the copies; 0 if there are
            none. None for sharded weights: `fully_shard` of single layers gathers each when it is needed.
    """

    compute: float
    copy: float
    hidden_from: int | None


def pace_of(estimate: Estimate, level: str, card: Card) -> Pace:
    """Return how long a micro-batch takes on paper.

    Args:
        estimate: Prediction for the run.
        level: Level of recomputation.
        card: GPU of each process.
    """
    # Forward, the gradient of the inputs, and the forward again.
    order = estimate.footprint.passes.order
    times = order.count(FORWARD) + order.count(BACKWARD) * (2 if level in RECOMPUTED else 1)
    per_token = 2 * times * estimate.footprint.products / (FLOPS_SHARE * card.flops)
    copied = estimate.placed.copied
    copy = copied / (BUS_SHARE * card.bus)
    hidden_from = int(-(-copy // per_token)) if copied else 0
    return Pace(per_token * estimate.tokens, copy, None if estimate.weights == "sharded" else hidden_from)
