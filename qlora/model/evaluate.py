"""Mean loss over held-out examples."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from qlora.data import Batch
from qlora.layers.placement import uneven_passes
from qlora.model.loss import SUPERVISED, Loss


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: Mean loss per unit; in nats per unit of supervised weight, unless another loss was evaluated.
        num_supervised: Number of supervised tokens.
        total_weight: Number of units that the mean is over: the weight of the supervised tokens, unless another loss
            was evaluated.
        metrics: Mean of each of the loss's metrics, and what it summarizes from its counts, by name.
        counts: Sums of the loss's counts, as nested lists.
        is_per_token: Whether the loss is a cross-entropy per unit of supervised weight.
    """

    loss: float
    num_supervised: int
    total_weight: float
    metrics: dict[str, float] = field(default_factory=dict)
    is_per_token: bool = True
    counts: list[Any] = field(default_factory=list)

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None if the loss is not one of tokens."""
        return math.exp(min(self.loss, 700.0)) if self.is_per_token else None

    @property
    def bits(self) -> float | None:
        """Total loss of all supervised tokens in bits; None if the loss is not one of tokens."""
        return self.loss * self.total_weight / math.log(2) if self.is_per_token else None


@torch.no_grad()
def evaluate(
    model: Any,
    batches: Iterable[Batch],
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    loss: Loss = SUPERVISED,
) -> Evaluation:
    """Compute the mean loss in evaluation mode; the model's mode is restored afterwards.

    Args:
        model: A causal language model.
        batches: Batches of this process.
        reduce: Sums a tensor over all processes, if there are several.
        loss: Loss to evaluate; the supervised one by default.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # Loss, supervised tokens, units, each metric, and each count.
    num_means = 3 + len(loss.metrics)
    totals = torch.zeros(num_means + math.prod(loss.counts), dtype=torch.float64, device=device)
    if loss.ahead is not None:
        batches = _with_ahead(model, list(batches), reduce, loss, device)
    with uneven_passes(model):  # the other processes may have more batches
        for batch in batches:
            step = loss.compute(model, loss.learned_part(model, batch.to(device)))
            sums = loss.sums(step)
            totals[0] += sums[0]
            totals[1] += batch.num_supervised
            totals[2] += loss.units(batch)
            totals[3:num_means] += sums[1:]
            if step.counts is not None:
                totals[num_means:] += step.counts.flatten()
    model.train(was_training)
    loss_sum, num_supervised, units, *others = (totals if reduce is None else reduce(totals)).tolist()
    metrics, counted = others[: len(loss.metrics)], np.array(others[len(loss.metrics) :], dtype=np.int64)
    counts = counted.reshape(loss.counts).tolist()
    means = {name: value / (units or 1.0) for name, value in zip(loss.metrics, metrics, strict=True)}
    if loss.summarize is not None:
        means |= loss.summarize(counts)
    return Evaluation(loss_sum / (units or 1.0), int(num_supervised), units, means, loss.is_per_token, counts)


def _with_ahead(
    model: Any,
    batches: Sequence[Batch],
    reduce: Callable[[torch.Tensor], torch.Tensor] | None,
    loss: Loss,
    device: torch.device,
) -> list[Batch]:
    """Return batches with the means over all of them, of every process, that the loss computes ahead."""
    assert loss.ahead is not None
    totals = torch.zeros(loss.num_ahead + 1, dtype=torch.float32, device=device)
    with uneven_passes(model):
        for batch in batches:
            totals[:-1] += loss.ahead(model, batch.to(device))
            totals[-1] += loss.units(batch)
    totals = totals if reduce is None else reduce(totals)
    return [replace(batch, ahead=totals[:-1] / totals[-1]) for batch in batches]
