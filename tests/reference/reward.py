"""Slow references for models that score documents."""

import torch


def scores_one_by_one(model, documents):
    """Return the scores that a class of transformers gives documents, each alone in its batch."""
    ids = [torch.from_numpy(document.input_ids).long()[None] for document in documents]
    return torch.stack([model(input_ids=each, use_cache=False).logits[0].float() for each in ids])


def bradley_terry(rewards, margins, center=0.0):
    """Return the sum over pairs of the negative log-likelihood that the first is preferred by a margin.

    Args:
        rewards: (pairs, 2), the preferred one first.
        margins: (pairs,).
        center: Factor of the squared sum of a pair's rewards.
    """
    total = torch.zeros(())
    for (chosen, rejected), margin in zip(rewards.double(), margins, strict=True):
        total = (
            total - torch.log(1 / (1 + torch.exp(-(chosen - rejected - margin)))) + center * (chosen + rejected) ** 2
        )
    return total
