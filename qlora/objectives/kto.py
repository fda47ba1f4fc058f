"""Learning from answers that were rated good or bad: KTO (arXiv:2402.01306)."""

from typing import Any

import torch

from qlora.config import PreferenceSection
from qlora.data import Batch
from qlora.data.mismatched import GOOD, RATING
from qlora.model import Loss, StepLoss
from qlora.model.log_probs import document_log_probs, fixed_log_probs, reference_log_probs
from qlora.objectives.objective import Objective
from qlora.objectives.preference import GROUP_SIZE, answers_loss, num_pairs

METRICS = ("reward_accuracy", "reward_margin", "log_prob", "reference_kl")


def kto_objective(options: PreferenceSection) -> Objective:
    """Return the objective of KTO; its loss is a mean over the rated answers.

    With r the logarithm of an answer's probability relative to the model at step 0, the loss of a good answer is
    w · (1 - σ(β (r - KL))), and of a bad one w · (1 - σ(β (KL - r))). KL is the mean of r over the mismatched answers
    of the whole step, at least 0, without a gradient; in an evaluation it is the mean over the whole set. The
    mismatched answers are in the data, see :class:`qlora.data.mismatched.MismatchedAnswers`.

    The metrics are means over rated answers: the share with r above KL for good and below it for bad ones (equal ones,
    as at the start, count half), the margin β · (r - KL) with the sign of the rating, the log-probability, and KL.
    """

    def mismatched(model: Any, batch: Batch) -> torch.Tensor:
        """Return the sum over the mismatched answers of their log-ratios, (1,)."""
        other = batch.select(range(1, len(batch.lengths), GROUP_SIZE))
        return (fixed_log_probs(model, other) - reference_log_probs(model, other)).sum()[None]

    def compute(model: Any, batch: Batch) -> StepLoss:
        assert batch.ahead is not None
        kl = batch.ahead[0].clamp(min=0)
        # Before the model's own forward, whose activations are then kept until the backward.
        reference = reference_log_probs(model, batch)
        log_probs, rating = document_log_probs(model, batch), batch.values[RATING].float()
        assert options.beta is not None
        assert options.desirable_weight is not None
        assert options.undesirable_weight is not None
        margin = options.beta * rating * (log_probs - reference - kl)
        weight = torch.where(rating > 0, options.desirable_weight, options.undesirable_weight)
        with torch.no_grad():
            accuracy = (margin > 0).float() + 0.5 * (margin == 0)
            values = (accuracy, margin, log_probs, kl.expand(len(margin)))
            metrics = {name: value.sum() for name, value in zip(METRICS, values, strict=True)}
        return StepLoss((weight * torch.sigmoid(-margin)).sum(), metrics)

    return Objective(
        name="kto",
        loss=Loss(
            compute=compute,
            units=num_pairs,
            metrics=METRICS,
            group_size=GROUP_SIZE,
            columns={RATING: torch.zeros((), dtype=torch.int8)},
            has_reference=True,
            ahead=mismatched,
            num_ahead=1,
        ),
        formats=frozenset({"kto"}),
        judge=answers_loss(good_answers),
        remedies={"preference": "set train.objective: dpo"},
    )


def good_answers(batch: Batch) -> list[int]:
    """Return the answers of a batch that were rated good."""
    return torch.nonzero(batch.values[RATING] == GOOD).flatten().tolist()
