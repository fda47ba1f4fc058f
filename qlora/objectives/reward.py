"""Reward models: a score for each text, trained on pairs of which one is preferred (Bradley-Terry)."""

from typing import Any

import torch
import torch.nn.functional as F

from qlora.data import Batch
from qlora.data.ratings import MARGIN
from qlora.lora import ScoreHead
from qlora.model import Loss, StepLoss
from qlora.model.score import document_scores
from qlora.objectives.objective import Objective
from qlora.objectives.preference import GROUP_SIZE, num_pairs

# Named as those of objectives whose rewards are log-probabilities.
METRICS = ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")


def reward_objective(center: float = 0.0) -> Objective:
    """Return the objective of reward models: −log σ(r₊ − r₋ − margin), the mean over pairs.

    A reward r is the score of a whole document, prompt included. The model is the base with a linear head of one score.
    TRL's RewardTrainer computes the same.

    Args:
        center: Factor of the mean of (r₊ + r₋)², which keeps rewards around zero (arXiv:2312.09244).
    """

    def compute(model: Any, batch: Batch) -> StepLoss:
        chosen, rejected = document_scores(model, batch)[:, 0].view(-1, GROUP_SIZE).unbind(1)
        difference = chosen - rejected
        margin = batch.values[MARGIN][::GROUP_SIZE]
        total = -F.logsigmoid(difference - margin).sum()
        if center:
            total = total + center * (chosen + rejected).square().sum()
        accuracy = (difference > 0).float() + 0.5 * (difference == 0)
        found = (accuracy, difference, chosen, rejected)
        return StepLoss(total, {name: value.detach().sum() for name, value in zip(METRICS, found, strict=True)})

    return Objective(
        name="reward",
        loss=Loss(
            compute=compute,
            units=num_pairs,
            metrics=METRICS,
            group_size=GROUP_SIZE,
            columns={MARGIN: torch.zeros(())},
            head=ScoreHead(1),
        ),
        formats=frozenset({"preference"}),
        remedies={"chosen": "remove data.format: chosen, so that the rejected answers are read too"},
    )
