"""Classification of texts: by the words that a model answers with, or by a head, with the labels of the data."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qlora.data import LABEL, Batch, Datasets, Labels, to_device
from qlora.data.labels import BY_HEAD
from qlora.errors import ConfigError
from qlora.lora import text_model
from qlora.model import Loss, StepLoss
from qlora.model.label_scores import word_scores
from qlora.model.loss import loss_of_rows, model_inputs, supervised_rows
from qlora.objectives.classify_head import head_loss
from qlora.objectives.confusion import ACCURACY, count_labels, summarize
from qlora.objectives.label_weights import LabelWeights
from qlora.objectives.objective import Objective


def answer_loss(labels: Labels | None = None, weights: Sequence[float] | None = None) -> Loss:
    """Return the loss of answering with a label's word: its cross-entropy, summed over the answer, per text.

    It is that of fine-tuning, over the whole vocabulary, so the model also answers so wherever it is served. A label is
    predicted by the scores of the words alone. Evaluations count predictions by label, which gives a macro F1.

    Args:
        labels: The labels with their answers; None to compute no metrics.
        weights: Weight of each label's texts; None weighs them the same.
    """

    of_labels = LabelWeights(weights)

    def compute(model: Any, batch: Batch) -> StepLoss:
        hidden = text_model(model)(**model_inputs(model, batch)).last_hidden_state
        rows, norm = supervised_rows(hidden, batch)
        own = None if weights is None else of_labels.of_texts(batch.values[LABEL].long())
        of_tokens = None if own is None else own[_documents(batch, rows.device)]
        loss, _ = loss_of_rows(model, batch, rows, norm, of_tokens)
        if labels is None:
            return StepLoss(loss)
        numbers = batch.values[LABEL].long()
        predicted = word_scores(model, batch, rows, norm, labels).argmax(dim=1)
        counts = count_labels(numbers, predicted, len(labels.names))
        return StepLoss(loss, {ACCURACY: of_labels.sum_correct(predicted, numbers)}, counts)

    if labels is None:
        return Loss(compute, of_labels.units)
    size = len(labels.names)
    return Loss(
        compute,
        of_labels.units,
        metrics=(ACCURACY,),
        counts=(size, size),
        columns={LABEL: torch.zeros((), dtype=torch.int32)},
        summarize=summarize,
    )


def classify_objective(by: str) -> Objective:
    """Return the objective of classification before its labels are known, which is what memory is estimated with.

    Args:
        by: How a label is predicted: by a `head`, or by `tokens`.
    """
    loss = head_loss(("first", "second")) if by == BY_HEAD else answer_loss()
    return Objective(name="classify", loss=loss, formats=frozenset({"classification", "images"}))


def with_labels(objective: Objective, datasets: Datasets, class_weights: str | Mapping[str, float] | None) -> Objective:
    """Return the objective of classification for the labels of its data.

    Args:
        objective: :func:`classify_objective`.
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
        own = datasets.train.values(LABEL)
        counts = own.sum(axis=0) if labels.is_multiple else np.bincount(own, minlength=len(labels.names))
        weights = [float(counts.sum() / (np.count_nonzero(counts) * count)) if count else 1.0 for count in counts]
    weighted = None if weights is None else label_loss(labels, weights)
    return replace(objective, loss=label_loss(labels), weighted=weighted, label_weights=weights)


def label_loss(labels: Labels, weights: Sequence[float] | None = None) -> Loss:
    """Return the loss for a head or for label words, as `labels.by` says: :func:`head_loss` or :func:`answer_loss`."""
    if labels.by == BY_HEAD:
        return head_loss(labels.names, labels.is_multiple, weights)
    return answer_loss(labels if labels.answers else None, weights)


def _documents(batch: Batch, device: torch.device) -> torch.Tensor:
    """Return the number of each supervised token's document, (supervised tokens,), int64."""
    return to_device(torch.from_numpy(np.repeat(np.arange(len(batch.counts)), batch.counts)), device)
