"""Mean loss over held-out examples."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qlora.data import Batch
from qlora.model.loss import supervised_loss


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss over supervised tokens.

    Attributes:
        loss: Mean over supervised tokens by their weights, in nats.
        num_supervised: Tokens that it is the mean of.
        total_weight: Of them.
    """

    loss: float
    num_supervised: int
    total_weight: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits(self) -> float:
        """What all supervised tokens cost together."""
        return self.loss * self.total_weight / math.log(2)


@torch.no_grad()
def evaluate(
    model: Any, batches: Iterable[Batch], reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Evaluation:
    """Computes the training loss in evaluation mode, and leaves the model in the mode it was in.

    Args:
        model: A causal language model.
        batches: Of this process.
        reduce: Sums a tensor over processes, where there are several.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        totals[0] += supervised_loss(model, batch.to(device))
        totals[1] += batch.num_supervised
        totals[2] += batch.total_weight
    model.train(was_training)
    loss, num_supervised, total_weight = (totals if reduce is None else reduce(totals)).tolist()
    return Evaluation(loss / (total_weight or 1.0), int(num_supervised), total_weight)
