"""Scores of labels by the words that a model answers with: the logits of the tokens that decide between them."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from qlora.data import Batch, Labels, to_device
from qlora.kernels.head import transform_logits
from qlora.lora import head_blocks
from qlora.model.loss import logit_transform


def word_scores(
    model: Any,
    batch: Batch,
    rows: torch.Tensor,
    norm: Callable[[torch.Tensor], torch.Tensor] | None,
    labels: Labels,
) -> torch.Tensor:
    """Compute the scores of labels for each document of a batch, whose supervised tokens are a label's answer.

    They are the logits of the tokens that decide between the answers, after the prompt and what all answers begin with,
    so their softmax is the probability of each label given that the answer is one of them. Only these rows of the head
    are used.

    Args:
        model: A causal language model.
        batch: A batch on the model's device.
        rows: Hidden states that the supervised tokens are predicted from, (supervised tokens, features); see
            :func:`qlora.model.loss.supervised_rows`, as `norm`.
        norm: Norm that the rows still need; None if there is none.
        labels: The labels with their answers.

    Returns:
        (documents, labels), fp32, without a gradient.
    """
    begins = [begin + labels.offset for begin in accumulate(batch.counts[:-1], initial=0)]
    places = to_device(torch.tensor(begins), rows.device)
    with torch.no_grad():
        states = rows.detach().index_select(0, places)
        states = states if norm is None else norm(states)
        head = model.get_output_embeddings()
        weight = rows_of_head(head_blocks(head), labels.deciding)
        bias = None if head.bias is None else head.bias[to_device(torch.tensor(labels.deciding), head.bias.device)]
        logits = F.linear(states, weight.to(states.dtype), bias).float()
        return transform_logits(logits, *logit_transform(model.config))


def rows_of_head(blocks: Sequence[torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
    """Return the rows of a head with the given ids, (ids, features), from consecutive blocks of its rows."""
    found, begin = [], 0
    places = {id_: place for place, id_ in enumerate(ids)}
    order: list[int] = []
    for block in blocks:
        own = [id_ for id_ in ids if begin <= id_ < begin + len(block)]
        index = to_device(torch.tensor([id_ - begin for id_ in own], dtype=torch.int64), block.device)
        found.append(block.index_select(0, index))
        order += [places[id_] for id_ in own]
        begin += len(block)
    rows = torch.cat([each.to(found[0].dtype) for each in found])
    return rows[to_device(torch.tensor(order).argsort(), rows.device)]


def predicted_labels(scores: torch.Tensor, is_multiple: bool) -> torch.Tensor:
    """Return the number of each text's label, (texts,) int64; with several labels 1 for each of them, (texts, labels).

    Args:
        scores: (texts, labels).
        is_multiple: Whether a text can have several labels: those with a probability above one half.
    """
    return (scores > 0).long() if is_multiple else scores.argmax(dim=1)
