"""What keeps a model close to its base while it is trained."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qlora.data import Batch
from qlora.data.batches import to_device
from qlora.kernels import linear_kl_divergence
from qlora.lora import adapters_off, head_blocks, text_model
from qlora.model import Loss, StepLoss
from qlora.model.loss import logit_transform, model_inputs, supervised_rows


def with_base_kl(loss: Loss, weight: float) -> Loss:
    """Return a loss with `weight` times KL(base ‖ model) per supervised token.

    Where the loss is not a mean over tokens but over pairs, answers or texts, the divergence is the mean over each
    document's tokens.

    The base is the model itself with its adapters off, as in ASFT (arXiv:2509.23753). It predicts from the clean tokens
    in evaluation mode, while the model predicts from the same forward pass that the loss is computed from, noise and
    dropout included. The direction is the forward one: the model is asked to cover what the base predicts. The metric
    `kl` is the divergence without the weight.

    Args:
        loss: A loss of one pass, with a single forward pass that gets a gradient.
        weight: Factor on the divergence.
    """

    def compute(model: Any, batch: Batch) -> StepLoss:
        states: list[torch.Tensor] = []

        def watch(_module: Any, _inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                states.append(output.last_hidden_state)

        handle = text_model(model).register_forward_hook(watch)
        try:
            step = loss.compute(model, batch)
        finally:
            handle.remove()
        (hidden,) = states
        rows, norm = supervised_rows(hidden, batch)
        # After the model's own forward: that leaves its memory as it is until the head, where there is room.
        base_rows, base_blocks = predict_base(model, batch)
        head = model.get_output_embeddings()
        scale, softcap = logit_transform(model.config)
        divergence = linear_kl_divergence(
            rows, head_blocks(head), base_rows, base_blocks, head.bias,
            logit_scale=scale, softcap=softcap, row_weights=_row_weights(loss, batch), norm=norm,
        )  # fmt: skip
        return StepLoss(step.total + weight * divergence, {**step.metrics, "kl": divergence.detach()})

    return replace(loss, compute=compute, metrics=(*loss.metrics, "kl"))


def _row_weights(loss: Loss, batch: Batch) -> torch.Tensor | None:
    """Return what the divergence of each supervised token counts in the units of a loss, (tokens,); None for 1."""
    num_units = loss.units(batch)
    if num_units == batch.total_weight:
        return batch.weights
    # Of a loss that looks ahead, one document of each group is here.
    num_units *= 1 if loss.ahead is None else loss.group_size
    per_document = num_units / len(batch.lengths)
    shares = np.repeat([per_document / (total or 1.0) for total in batch.weight_sums], batch.counts)
    weights = to_device(torch.from_numpy(shares.astype(np.float32)), batch.input_ids.device)
    return weights if batch.weights is None else weights * batch.weights


@torch.no_grad()
def predict_base(model: Any, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return the base's hidden states of the supervised tokens, ready for its head, and the head's blocks."""
    was_training = model.training
    model.eval()
    try:
        with adapters_off(model):
            hidden = text_model(model)(**model_inputs(model, batch)).last_hidden_state
            blocks = head_blocks(model.get_output_embeddings())
    finally:
        model.train(was_training)
    return hidden.flatten(0, 1).index_select(0, batch.supervised), blocks
