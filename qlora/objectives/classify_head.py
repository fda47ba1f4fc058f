"""Classification of texts by a head: a score for each label, read at a text's last token."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qlora.data import LABEL, Batch
from qlora.lora import ScoreHead
from qlora.model import Loss, StepLoss
from qlora.model.label_scores import predicted_labels
from qlora.model.score import document_scores
from qlora.objectives.confusion import ACCURACY, count_labels, summarize
from qlora.objectives.label_weights import LabelWeights

SINGLE, MULTIPLE = "single_label_classification", "multi_label_classification"


def head_loss(names: Sequence[str], is_multiple: bool = False, weights: Sequence[float] | None = None) -> Loss:
    """Return the loss of a head with a score for each label, a mean over texts by their weights.

    Where a text has one label, it is the cross-entropy of the scores; where it can have several, or none, the binary
    cross-entropy of each score, averaged over the labels. Transformers computes the same without weights. The metric is
    the share of texts whose label, or all of whose labels, are predicted.

    Args:
        names: Name of each label. `Batch.values` has a column `label`, (documents,) with the numbers of the labels, or
            (documents, labels) with 1 where a text has a label.
        is_multiple: Whether a text can have several labels, or none.
        weights: Weight of each label: of the texts that have it, or of its score's loss where there can be several.
    """
    of_labels = LabelWeights(weights)

    def compute(model: Any, batch: Batch) -> StepLoss:
        scores, given = document_scores(model, batch), batch.values[LABEL]
        own = of_labels.by_label(scores.device)
        predicted = predicted_labels(scores, is_multiple)
        counts = count_labels(given.long(), predicted, len(names))
        if is_multiple:
            losses = F.binary_cross_entropy_with_logits(scores, given.float(), own, reduction="none")
            return StepLoss(losses.mean(dim=1).sum(), {ACCURACY: (predicted == given).all(dim=1).float().sum()}, counts)
        number = given.long()
        loss = F.cross_entropy(scores, number, own, reduction="sum")
        return StepLoss(loss, {ACCURACY: of_labels.sum_correct(predicted, number)}, counts)

    made_up = torch.zeros(len(names) if is_multiple else (), dtype=torch.uint8 if is_multiple else torch.int32)
    head = ScoreHead(len(names), tuple(names), MULTIPLE if is_multiple else SINGLE)
    return Loss(
        compute=compute,
        units=(LabelWeights() if is_multiple else of_labels).units,
        metrics=(ACCURACY,),
        counts=(len(names), 2, 2) if is_multiple else (len(names), len(names)),
        summarize=summarize,
        columns={LABEL: made_up},
        head=head,
    )
