"""The supervised loss of a causal language model, without ever holding the logits of a batch."""

from typing import Any

import torch

from qlora.data import IGNORE_INDEX, Batch
from qlora.kernels import linear_cross_entropy


def supervised_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum over the batch of -log p(label), over supervised positions alone.

    Args:
        model: A causal language model of transformers whose head is frozen.
        batch: On the model's device.

    Returns:
        A scalar, fp32, to be divided by the supervised tokens of whatever is averaged over.
    """
    hidden = model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    supervised = batch.labels != IGNORE_INDEX
    head = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    return linear_cross_entropy(hidden[supervised], head.weight, batch.labels[supervised], head.bias, scale, softcap)


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Factor and soft cap that an architecture puts on its head's product, by its config's keys."""
    text_config = config.get_text_config()
    scale = getattr(text_config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(text_config, "logits_scaling", None) or 1.0  # Granite divides
    return scale, getattr(text_config, "final_logit_softcapping", None)
