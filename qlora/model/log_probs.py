"""Log-probabilities of the supervised tokens of whole documents, without the logits of a batch."""

from typing import Any

import torch

from qlora.data import Batch
from qlora.kernels import linear_log_probs
from qlora.lora import adapters_at_start, head_blocks, text_model
from qlora.model.loss import logit_transform, model_inputs, supervised_rows


def document_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Compute the sum over each document's supervised tokens of log p(token) times the token's weight.

    Args:
        model: A causal language model of transformers.
        batch: A batch on the model's device.

    Returns:
        (documents,), fp32.
    """
    hidden = text_model(model)(**model_inputs(model, batch)).last_hidden_state
    head = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    rows, norm = supervised_rows(hidden, batch)
    labels = batch.labels.flatten().index_select(0, batch.supervised)
    log_probs = linear_log_probs(
        rows, head_blocks(head), labels, head.bias, logit_scale=scale, softcap=softcap, norm=norm
    )
    if batch.weights is not None:
        log_probs = log_probs * batch.weights
    # Not by scattered additions, whose order on a GPU differs from run to run.
    return torch.stack([each.sum() for each in log_probs.split(batch.counts)])


@torch.no_grad()
def fixed_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Compute :func:`document_log_probs` without gradient, and without dropout."""
    was_training = model.training
    model.eval()
    try:
        return document_log_probs(model, batch)
    finally:
        model.train(was_training)


def reference_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Compute the log-probabilities of documents, (documents,), under the model as it was at step 0 of its run."""
    with adapters_at_start(model):
        return fixed_log_probs(model, batch)
