"""Losses of pairs of answers and of rated answers, written from their papers, over whole logits."""

from typing import Any

import torch


def log_probs(model: Any, example: Any) -> tuple[torch.Tensor, float]:
    """Return the log-probability of a document's supervised tokens by the model's own logits, and their number."""
    ids = torch.from_numpy(example.input_ids).long()[None]
    weights = torch.from_numpy(example.weights).float()
    logits = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return (logits[:-1].gather(1, ids[0, 1:, None]).squeeze(1) * weights[1:]).sum(), float(weights.sum())


def log_sigmoid(value: torch.Tensor) -> torch.Tensor:
    return -torch.log1p(torch.exp(-value))


def pair_loss(
    name: str,
    chosen: tuple[torch.Tensor, float],
    rejected: tuple[torch.Tensor, float],
    references: tuple[torch.Tensor, torch.Tensor],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    gamma: float = 0.0,
    length_normalize: bool = False,
) -> torch.Tensor:
    """Return the loss of one pair, given the log-probability and the length of both answers."""
    (log_w, len_w), (log_l, len_l) = chosen, rejected
    if name == "orpo":
        odds_w, odds_l = (p / (1 - p) for p in (torch.exp(log_w / len_w), torch.exp(log_l / len_l)))
        loss = -beta * log_sigmoid(torch.log(odds_w / odds_l))
    else:
        ref_w, ref_l = references if name in ("dpo", "ipo") else (0.0, 0.0)
        score_w, score_l = log_w - ref_w, log_l - ref_l
        if length_normalize:
            score_w, score_l = score_w / len_w, score_l / len_l
        delta = score_w - score_l
        if name == "ipo":
            loss = (delta - 1 / (2 * beta)) ** 2
        else:
            z = beta * delta - gamma
            loss = -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)
    return loss - sft_weight * log_w / len_w


def kto_loss(ratio: torch.Tensor, is_good: bool, kl: float, *, beta: float, good: float, bad: float) -> torch.Tensor:
    """Return the loss of one rated answer, given the log-ratio to the reference."""
    z = ratio - kl if is_good else kl - ratio
    return (good if is_good else bad) * (1 - torch.sigmoid(beta * z))
