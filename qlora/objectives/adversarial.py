"""Adversarial training: a second pass on embeddings moved against the loss.

FGM (arXiv:1605.07725), which is FreeLB (arXiv:1909.11764) with one step.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from qlora.data import Batch
from qlora.model import Loss, StepLoss
from qlora.model.embeddings import changed_embeddings

CLEAN, ADVERSARIAL = "clean_loss", "adversarial_loss"


def with_adversary(loss: Loss, epsilon: float) -> Loss:
    """Return a loss that is trained as the mean of itself and of itself on perturbed embeddings, in two passes.

    The metrics of the loss are those of its clean pass. Evaluations compute the clean loss alone.

    Args:
        loss: A loss of one pass.
        epsilon: Length of each token's perturbation, which has the direction of the loss's gradient.
    """

    def passes(model: Any, batch: Batch) -> Iterator[StepLoss]:
        gradients: list[torch.Tensor] = []

        def watch(embedded: torch.Tensor) -> torch.Tensor:
            if not embedded.requires_grad:  # its rows are frozen
                embedded = embedded.detach().requires_grad_()
            embedded.register_hook(gradients.append)
            return embedded

        with changed_embeddings(model, watch):
            clean = loss.compute(model, batch)
        value = clean.total.detach()
        zero = torch.zeros_like(value)
        yield StepLoss(clean.total / 2, {**clean.metrics, CLEAN: value, ADVERSARIAL: zero})
        delta = perturbation(gradients.pop(), epsilon)
        with changed_embeddings(model, lambda embedded: embedded + delta):
            perturbed = loss.compute(model, batch)
        nothing = dict.fromkeys((*loss.metrics, CLEAN), zero)
        yield StepLoss(perturbed.total / 2, {**nothing, ADVERSARIAL: perturbed.total.detach()})

    return replace(loss, metrics=(*loss.metrics, CLEAN, ADVERSARIAL), passes=passes)


def perturbation(gradient: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return each token's gradient with the length epsilon; zero where it is zero or not finite.

    It does not depend on the scale of the gradient, and so not on fp16 loss scaling.

    Args:
        gradient: (batch, seq, features), in the compute dtype.
        epsilon: Length in the units of the embedded tokens.
    """
    scaled = gradient.float()
    scaled = scaled / scaled.abs().amax(-1, keepdim=True)  # first, because squares may under- or overflow
    direction = scaled / scaled.norm(dim=-1, keepdim=True)
    is_usable = direction.isfinite().all(-1, keepdim=True)
    return torch.where(is_usable, epsilon * direction, 0.0).to(gradient.dtype)
