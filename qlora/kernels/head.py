"""An output head in blocks of rows, whose logits are computed in chunks and never for a whole batch."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch

from qlora.kernels.simulated import device_of

# Logits held at a time; on a CPU, bytes of their products. On a GPU they are whole rows: a multiple of what a product's
# tile has, and enough of them that the head is read few times, unless they would take more than this share of the
# memory.
CHUNK_ELEMENTS, CHUNK_BYTES_CPU = 1 << 24, 1 << 24
TILE_ROWS, ENOUGH_ROWS, MEMORY_SHARE = 128, 512, 1 / 64
# Logits in fp32 that each thread of a CPU works on at a time: from pass to pass they stay in a core's cache
# (docs/benchmarks/loss.md).
BLOCK_ELEMENTS_CPU = 1 << 18
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
        return CHUNK_BYTES_CPU // dtype.itemsize
    if device.type == "meta":
        return META_ROWS * size
    memory = ASSUMED_MEMORY
    if device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device).total_memory
    affordable = min(ENOUGH_ROWS, int(memory * MEMORY_SHARE) // (bytes_per_logit(device, dtype) * size))
    rows = max(affordable, CHUNK_ELEMENTS // size) // TILE_ROWS * TILE_ROWS
    return max(TILE_ROWS, rows) * size


def bytes_per_logit(device: torch.device, dtype: torch.dtype) -> int:
    """Return the bytes that plain torch holds for a logit of a chunk, with a frozen head and without a soft cap.

    These are products in 16 bits and, unless it is computed in blocks as on a CPU, one logit in fp32. A kernel that
    overwrites the products holds fewer.

    Args:
        device: The device.
        dtype: Dtype of the products.
    """
    return dtype.itemsize if dtype == torch.float32 or device.type == "cpu" else 4 + dtype.itemsize


def fp32_buffer(products: torch.Tensor, is_trained: bool) -> torch.Tensor:
    """Return memory for :func:`fp32_blocks` of products.

    Args:
        products: (rows, size), the memory for the products of a chunk.
        is_trained: Whether a block of the head is trained: its gradient takes those of all logits in fp32.
    """
    rows, size = products.shape
    if not is_trained and device_of(products).type == "cpu":
        rows = min(rows, max(1, BLOCK_ELEMENTS_CPU * torch.get_num_threads() // size))
    if products.dtype == torch.float32:
        return products[:rows]
    return torch.empty(rows, size, dtype=torch.float32, device=products.device)


def fp32_blocks(product: torch.Tensor, buffer: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the rows of each block of a chunk, and their products in fp32, which may be overwritten.

    On the meta device one block stands for all, because they are in the same memory one after the other.

    Args:
        product: (rows, size), the products of a chunk.
        buffer: See :func:`fp32_buffer`; products in fp32 are not copied to it.
    """
    for start in range(0, min(1, len(product)) if product.is_meta else len(product), len(buffer)):
        rows = slice(start, start + len(buffer))
        block = product[rows]
        yield rows, block if block.dtype == torch.float32 else buffer[: len(block)].copy_(block)


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
        is_trained: Whether any block gets a gradient.
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
        self.size, self.is_trained = bounds[-1], any(trained)
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
        exact: torch.Tensor | None,
    ) -> None:
        """Compute a chunk's gradients: add those of the trained blocks, and write that of its inputs.

        Args:
            grad_logits: (rows, size), in the dtype of the products.
            inputs: See :func:`apply_norm`, as `normed`.
            normed: Hidden states that the logits were computed from, (rows, features).
            grad_inputs: (rows, features), written; None if it is not needed.
            exact: The gradient of the logits in fp32; None if no block is trained.
        """
        if exact is not None:
            self.add_grad(exact, normed.detach())
        if grad_inputs is not None:
            self.multiply_back(grad_logits, grad_inputs)
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
