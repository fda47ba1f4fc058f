"""NEFTune: uniform noise on the embedded tokens while training (arXiv:2310.05914)."""

from dataclasses import replace
from typing import Any

import torch

from qlora.data import Batch
from qlora.model import Loss, StepLoss
from qlora.model.embeddings import changed_embeddings


def with_noise(loss: Loss, alpha: float) -> Loss:
    """Return a loss whose forward passes add noise to the embedded tokens; those without gradients add none.

    Args:
        loss: A loss of one pass.
        alpha: Scale of the noise: it is U(-1, 1) · alpha / sqrt(tokens of the document · features).
    """

    def compute(model: Any, batch: Batch) -> StepLoss:
        with changed_embeddings(model, lambda embedded: embedded + document_noise(batch, embedded, alpha)):
            return loss.compute(model, batch)

    return replace(loss, compute=compute)


def document_noise(batch: Batch, embedded: torch.Tensor, alpha: float) -> torch.Tensor:
    """Draw noise for each document by its seed, so that it does not depend on how documents are batched.

    Args:
        batch: A batch; without seeds, torch's own generator is used.
        embedded: Embedded tokens, (batch, seq, features).
        alpha: Scale of the noise.

    Returns:
        Noise of the shape and dtype of `embedded`, drawn in fp32; zero for padding.
    """
    noise = torch.zeros_like(embedded, requires_grad=False)
    packed = batch.cu_seq_lens is not None
    spans = noise[0].split(batch.lengths) if packed else [
        row[:length] for row, length in zip(noise, batch.lengths, strict=True)
    ]  # fmt: skip
    for number, span in enumerate(spans):
        generator = None
        if batch.seeds is not None:
            generator = torch.Generator(span.device).manual_seed(batch.seeds[number])
        bound = alpha / span.numel() ** 0.5
        span.copy_(torch.empty_like(span, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return noise
