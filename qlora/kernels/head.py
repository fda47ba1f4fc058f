"""An output head in blocks of rows, whose logits are computed in chunks and never for a whole batch."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

# Logits held at a time, in elements. On a CPU they stay in the caches from pass to pass (docs/benchmarks/loss.md). On a
# GPU they are whole rows: a multiple of what a product's tile has, and enough of them that the head is read few times,
# unless they would take more than this share of the memory.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU = 1 << 24, 1 << 23
TILE_ROWS, ENOUGH_ROWS, MEMORY_SHARE = 128, 512, 1 / 64
# Memory of a GPU that is not in this machine.
ASSUMED_MEMORY = 24 << 30
# On the meta device; a prime, so that memory estimates don't take a chunk of logits for a matrix of the model.
META_ROWS = 521


def default_chunk(device: torch.device, size: int, dtype: torch.dtype) -> int:
    """Return the number of logits held at a time on a device.

    Args:
        device: The device.
        size: Number of logits of a row.
        dtype: Dtype of the products.
    """
    if device.type == "cpu":
        return CHUNK_ELEMENTS_CPU
    if device.type == "meta":
        return META_ROWS * size
    memory = ASSUMED_MEMORY
    if device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device).total_memory
    affordable = min(ENOUGH_ROWS, int(memory * MEMORY_SHARE) // (bytes_per_logit(dtype) * size))
    rows = max(affordable, CHUNK_ELEMENTS // size) // TILE_ROWS * TILE_ROWS
    return max(TILE_ROWS, rows) * size


def bytes_per_logit(dtype: torch.dtype) -> int:
    """Return the bytes that plain torch holds for a logit, without a soft cap: one in fp32, and products in 16 bits.

    A kernel that overwrites the products holds fewer.

    Args:
        dtype: Dtype of the products.
    """
    return 4 if dtype == torch.float32 else 4 + dtype.itemsize


def transform_logits(logits: torch.Tensor, logit_scale: float, softcap: float | None) -> torch.Tensor:
    """Scale and soften logits, (rows, vocabulary) in fp32, in place, and return them.

    Args:
        logits: Products of hidden states and head.
        logit_scale: Factor on the logits (Cohere, Falcon H1, Granite).
        softcap: Logits become softcap · tanh(logits / softcap) (Gemma 2).
    """
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def slope_of(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Return the slope of the soft cap where it gave these logits, (rows, vocabulary) in fp32, with one temporary."""
    return (logits / softcap).square_().neg_().add_(1)


def apply_norm(
    hidden: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor] | None, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a chunk's rows as inputs of the last norm, and its outputs; the rows twice if there is no norm to apply.

    Args:
        hidden: (rows, features).
        norm: The norm, if the head's inputs are computed again from its inputs.
        needs_grad: Whether the inputs get a gradient, for which the graph of the norm is kept.
    """
    if norm is None:
        return hidden, hidden
    with torch.enable_grad():
        inputs = hidden.detach().requires_grad_(needs_grad)
        return inputs, norm(inputs)


def scale_gradients(gradients: Sequence[torch.Tensor | None], factor: torch.Tensor) -> list[torch.Tensor | None]:
    """Return gradients times the gradient of a loss, a scalar.

    In fp32: the factor is 1 / tokens or a loss scale, which would lose digits or overflow in 16 bits.
    """
    return [None if each is None else (each.float() * factor).to(each.dtype) for each in gradients]


class Head:
    """An output head's weight in blocks of rows, with the gradients of the trained blocks.

    Args:
        weights: Consecutive blocks, (rows, features) each.
        bias: (size,), for all blocks.
        dtype: Dtype of the products.
        trained: For each block, whether it gets a gradient.

    Attributes:
        size: Total number of rows.
        grads: Gradient of each block, fp32; None for frozen blocks.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        trained: Sequence[bool],
    ) -> None:
        # Contiguous, because equal blocks in other layouts have products that differ by rounding.
        self._weights, self._bias = [weight.to(dtype).contiguous() for weight in weights], bias
        bounds = list(accumulate(map(len, weights), initial=0))
        self._columns = [slice(*pair) for pair in pairwise(bounds)]
        self.size = bounds[-1]
        self.grads = [
            torch.zeros_like(weight, dtype=torch.float32) if is_trained else None
            for weight, is_trained in zip(weights, trained, strict=True)
        ]

    def multiply(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Write the logits of `hidden`, (rows, features), into `out`, (rows, size)."""
        for weight, columns in zip(self._weights, self._columns, strict=True):
            if self._bias is None:
                torch.mm(hidden, weight.T, out=out[:, columns])
            else:
                torch.addmm(self._bias[columns], hidden, weight.T, out=out[:, columns])

    def go_back(
        self,
        grad_logits: torch.Tensor,
        inputs: torch.Tensor,
        normed: torch.Tensor,
        grad_inputs: torch.Tensor | None,
        product: torch.Tensor,
    ) -> None:
        """Compute a chunk's gradients: add those of the trained blocks, and write that of its inputs.

        Args:
            grad_logits: (rows, size), fp32; or `product` itself, if no block is trained.
            inputs: See :func:`apply_norm`, as `normed`.
            normed: Hidden states that the logits were computed from, (rows, features).
            grad_inputs: (rows, features), written; None if it is not needed.
            product: Memory for the logits' gradient in the dtype of the products, (rows, size).
        """
        self.add_grad(grad_logits, normed.detach())
        if grad_inputs is not None:
            self.multiply_back(product if grad_logits is product else product.copy_(grad_logits), grad_inputs)
            if normed is not inputs:
                (grad,) = torch.autograd.grad(normed, inputs, grad_inputs)
                grad_inputs.copy_(grad)

    def multiply_back(self, grad_logits: torch.Tensor, out: torch.Tensor) -> None:
        """Write the gradient of the hidden states, (rows, features), given that of their logits."""
        first, *others = zip(self._weights, self._columns, strict=True)
        torch.mm(grad_logits[:, first[1]], first[0], out=out)
        for weight, columns in others:
            out.addmm_(grad_logits[:, columns], weight)

    def add_grad(self, grad_logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add to the gradients of trained blocks, given the hidden states and the logits' gradient, fp32."""
        for grad, columns in zip(self.grads, self._columns, strict=True):
            if grad is not None:
                grad.addmm_(grad_logits[:, columns].T, hidden.float())
