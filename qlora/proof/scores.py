"""Scores of texts by two models, one in memory at a time, and the objective's loss on them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qlora.data import collate, eval_batches
from qlora.data.tokens import TokenizedExample
from qlora.model import Loss, evaluate
from qlora.model.loss import model_inputs

# Largest difference of the scores of two models that match, relative to the scores: several times what rounding a model
# of a few billion parameters to 16 bits causes.
MAX_SCORE_DIFFERENCE = 0.05


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model gives texts.

    Attributes:
        scores: (texts, scores), fp32 on the CPU, as the model's own class computes them.
        loss: Mean loss of the objective on the texts; None if it is not known.
    """

    scores: torch.Tensor
    loss: float | None


@dataclass(frozen=True, slots=True)
class ScoreDistance:
    """Distance between the scores of two models.

    Attributes:
        positions: Number of texts.
        max_logit_difference: Largest difference of a score.
        mean_logit_difference: Mean difference over all scores.
        share: Norm of the differences relative to that of the scores.
    """

    positions: int
    max_logit_difference: float
    mean_logit_difference: float
    share: float

    @property
    def loss_noise(self) -> float:
        """How far rounding may move the mean loss of these texts, in nats.

        The loss of a text changes by at most twice what one of its scores does, that of a pair of texts by as much as
        both scores together. Scores further apart than :data:`MAX_SCORE_DIFFERENCE` have other causes and allow no
        more.
        """
        return 2 * self.mean_logit_difference * MAX_SCORE_DIFFERENCE / max(self.share, MAX_SCORE_DIFFERENCE)

    def as_dict(self) -> dict[str, float]:
        """Return the values that a report has."""
        values = asdict(self)
        del values["share"]
        return values


@torch.no_grad()
def predict_scores(model: Any, examples: Sequence[TokenizedExample], loss: Loss | None) -> Scores:
    """Return the scores of documents, each computed alone by the model's class, and the loss on all of them."""
    scores = [model(**model_inputs(model, collate([example]).to(model.device))).logits[0] for example in examples]
    value = None if loss is None else evaluate(model, eval_batches(examples, 1), loss=loss).loss
    return Scores(torch.stack(scores).float().cpu(), value)


def compare_scores(one: Scores, other: Scores) -> ScoreDistance:
    """Return the distance between what two models give the same texts."""
    difference = (one.scores - other.scores).abs()
    return ScoreDistance(
        positions=len(difference),
        max_logit_difference=difference.max().item(),
        mean_logit_difference=difference.mean().item(),
        share=(difference.norm() / one.scores.norm()).item(),
    )
