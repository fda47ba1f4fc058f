"""Adversarial training by plain autograd: the mean of the clean and the perturbed loss, one document at a time."""

from typing import Any

import torch
import torch.nn.functional as F


def adversarial_loss(
    model: Any, examples: Any, epsilon: float, parameters: list[torch.Tensor]
) -> tuple[float, float, list[torch.Tensor]]:
    """Return the clean and the adversarial mean loss, and the gradient of their mean."""
    count = sum(example.num_supervised for example in examples)
    clean_sum, adversarial_sum = 0.0, 0.0
    grads = [torch.zeros_like(parameter) for parameter in parameters]
    for example in examples:
        ids = torch.tensor(example.input_ids[None].astype("int64"))
        supervised = torch.tensor(example.weights[1:] > 0)

        def loss_of(embedded: torch.Tensor, ids: torch.Tensor = ids, chosen: torch.Tensor = supervised) -> torch.Tensor:
            logits = model(inputs_embeds=embedded).logits[0, :-1].float()
            return F.cross_entropy(logits[chosen], ids[0, 1:][chosen], reduction="sum") / count

        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(embedded), embedded)
        delta = torch.zeros_like(gradient)
        for place, row in enumerate(gradient[0]):
            if row.norm() > 0:
                delta[0, place] = epsilon * row / row.norm()
        own = model.get_input_embeddings()(ids)
        clean, adversarial = loss_of(own), loss_of(own + delta)
        for total, part in zip(grads, torch.autograd.grad((clean + adversarial) / 2, parameters), strict=True):
            total += part
        clean_sum, adversarial_sum = clean_sum + clean.item(), adversarial_sum + adversarial.item()
    return clean_sum, adversarial_sum, grads
