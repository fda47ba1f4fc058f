"""Classification of texts by the words that a model answers with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qlora.data import LABEL, Batch, Datasets, Labels, TokenizedExample
from qlora.errors import ConfigError
from qlora.model import Loss, StepLoss
from qlora.model.label_scores import word_scores
from qlora.model.loss import loss_of_rows, model_inputs, supervised_rows
from qlora.objectives.confusion import macro_f1, matrix_of
from qlora.objectives.objective import Objective

ACCURACY, MACRO_F1 = "accuracy", "macro_f1"


def answer_loss(labels: Labels | None = None, weights: Sequence[float] | None = None) -> Loss:
    """Return the loss of answering with a label's word: its cross-entropy, summed over the answer, per text.

    It is that of fine-tuning, over the whole vocabulary, so the model also answers so wherever it is served. A label is
    predicted by the scores of the words alone. Evaluations count predictions by label, which gives a macro F1.

    Args:
        labels: The labels with their answers; None to compute no metrics.
        weights: Weight of each label's texts; None weighs them the same.
    """

    def compute(model: Any, batch: Batch) -> StepLoss:
        hidden = model.base_model(**model_inputs(model, batch)).last_hidden_state
        rows, norm = supervised_rows(hidden, batch)
        if labels is None:
            return StepLoss(loss_of_rows(model, batch, rows, norm, None)[0])
        numbers = batch.values[LABEL].long()
        own = None if weights is None else torch.tensor(weights, device=rows.device)[numbers]
        of_tokens = None if own is None else own[_documents(batch, rows.device)]
        loss, _ = loss_of_rows(model, batch, rows, norm, of_tokens)
        predicted = word_scores(model, batch, rows, norm, labels).argmax(dim=1)
        correct = (predicted == numbers).float()
        size = len(labels.names)
        # Not bincount, which makes the host wait for the device.
        counts = numbers.new_zeros(size * size).index_add_(0, numbers * size + predicted, torch.ones_like(numbers))
        return StepLoss(loss, {ACCURACY: correct.sum() if own is None else correct @ own}, counts)

    def units(part: TokenizedExample | Batch) -> float:
        if weights is None:
            return len(part.lengths) if isinstance(part, Batch) else 1
        return float(np.asarray(weights)[np.asarray(part.values[LABEL])].sum())

    if labels is None:
        return Loss(compute, units)
    size = len(labels.names)
    return Loss(
        compute,
        units,
        metrics=(ACCURACY,),
        counts=size * size,
        columns={LABEL: torch.zeros((), dtype=torch.int32)},
        summarize=lambda counts: {MACRO_F1: macro_f1(matrix_of(counts))},
    )


# Before labels are known: the loss without its metrics, which is what memory is estimated with.
CLASSIFY = Objective(name="classify", loss=answer_loss(), formats=frozenset({"classification"}))


def with_labels(objective: Objective, datasets: Datasets, class_weights: str | Mapping[str, float] | None) -> Objective:
    """Return the objective of classification for the labels of its data.

    Args:
        objective: :data:`CLASSIFY`.
        datasets: Data with labels, whose training examples are counted for balanced weights.
        class_weights: `balanced`, a weight by name, or None.

    Raises:
        ConfigError: A weight is given for a label that there is not.
    """
    labels = datasets.labels
    assert labels is not None, "classification has labels"
    weights = None
    if isinstance(class_weights, Mapping):
        if unknown := sorted(class_weights.keys() - set(labels.names)):
            raise ConfigError(
                f"train.class_weights: {', '.join(unknown)} is no label; the labels are {', '.join(labels.names)}."
            )
        weights = [class_weights.get(name, 1.0) for name in labels.names]
    elif class_weights == "balanced":
        counts = np.bincount(datasets.train.values(LABEL), minlength=len(labels.names))
        weights = [float(counts.sum() / (np.count_nonzero(counts) * count)) if count else 1.0 for count in counts]
    return replace(
        objective, loss=answer_loss(labels), trained=None if weights is None else answer_loss(labels, weights)
    )


def _documents(batch: Batch, device: torch.device) -> torch.Tensor:
    """Return the number of each supervised token's document, (supervised tokens,), int64."""
    return torch.from_numpy(np.repeat(np.arange(len(batch.counts)), batch.counts)).to(device)
