"""Reward models: a score for each text, trained on pairs of which one is preferred (Bradley-Terry)."""

from typing import Any

import torch.nn.functional as F

from qlora.data import Batch, TokenizedExample
from qlora.data.ratings import MARGIN
from qlora.lora import ScoreHead
from qlora.model import Loss, StepLoss
from qlora.model.score import document_scores
from qlora.objectives.objective import Objective

NAME = "reward"
METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")
PAIR = 2


def reward_objective(center: float = 0.0) -> Objective:
    """Return the objective of reward models: −log σ(r₊ − r₋ − margin), the mean over pairs.

    A reward r is the score of a whole document, prompt included. The model is the base with a linear head of one score.
    TRL's RewardTrainer computes the same.

    Args:
        center: Factor of the mean of (r₊ + r₋)², which keeps rewards around zero (arXiv:2312.09244).
    """

    def compute(model: Any, batch: Batch) -> StepLoss:
        chosen, rejected = document_scores(model, batch)[:, 0].view(-1, PAIR).unbind(1)
        difference = chosen - rejected
        margin = batch.values[MARGIN].view(-1, PAIR)[:, 0] if MARGIN in batch.values else 0.0
        total = -F.logsigmoid(difference - margin).sum()
        if center:
            total = total + center * (chosen + rejected).square().sum()
        found = ((difference > 0).float(), difference, chosen, rejected)
        return StepLoss(total, {name: value.detach().sum() for name, value in zip(METRICS, found, strict=True)})

    return Objective(
        name=NAME,
        loss=Loss(compute, _count_pairs, METRICS, head=ScoreHead(1)),
        formats=frozenset({"preference"}),
        remedies={"chosen": "remove data.format: chosen, so that the rejected answers are read too"},
    )


def _count_pairs(part: TokenizedExample | Batch) -> float:
    return (len(part.lengths) if isinstance(part, Batch) else 1) / PAIR
