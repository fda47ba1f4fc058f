"""The bytes of a layer's packed weights as one tensor, to split or to keep on the host, and slots on the device."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import Protocol

import torch

# Every tensor of a layer begins at a multiple of these bytes, as kernels expect.
ALIGNMENT = 256
# Host memory is allocated in pieces of this size, because torch rounds each that is pinned up to a power of two.
PIECE_BYTES = 1 << 23
# Layers on the device at a time: the one that computes, and the next one.
NUM_SLOTS = 2


class PackedWeight(Protocol):
    """A frozen weight in packed form: `NF4Linear` or `NF4Experts`."""

    weight: torch.nn.Parameter
    before_read: Callable[[], None] | None

    @property
    def packed(self) -> list[torch.Tensor]:
        """The tensors that hold it."""

    def use_packed(self, tensors: Sequence[torch.Tensor]) -> None:
        """Use other tensors in their place."""


class PackedLayer:
    """The packed weights of a layer, with their statistics, as one run of bytes.

    Args:
        weights: The weights.

    Attributes:
        num_bytes: Number of bytes.
    """

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        tensors = [tensor for weight in weights for tensor in weight.packed]
        self._offsets = [0, *accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)]
        self._kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._weights, self.num_bytes = list(weights), self._offsets[-1]

    def take(self, device: torch.device) -> torch.Tensor:
        """Return the bytes, (bytes,) uint8 on a device; the weights themselves hold nothing any more."""
        content = torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        tensors = (tensor for weight in self._weights for tensor in weight.packed)
        for tensor, offset in zip(tensors, self._offsets, strict=False):
            content[offset : offset + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        for weight in self._weights:
            weight.use_packed([each.new_empty([1] * each.dim()).expand(each.shape) for each in weight.packed])
        return content

    def fetch_by(self, before_read: Callable[[], None]) -> None:
        """Have a function called before a weight is read, which brings the bytes to where :meth:`use` expects them."""
        for weight in self._weights:
            weight.before_read = before_read

    def use(self, content: torch.Tensor) -> None:
        """Make the weights views of the memory that the bytes come to, (bytes,) uint8."""
        views = self._views(content)
        for weight in self._weights:
            weight.use_packed([next(views) for _ in weight.packed])

    def uses(self, content: torch.Tensor) -> bool:
        """Return whether the weights are views of this memory, as it is now."""
        return self._weights[0].weight.data_ptr() == content.data_ptr()

    def _views(self, content: torch.Tensor) -> Iterator[torch.Tensor]:
        for (shape, dtype), offset in zip(self._kinds, self._offsets, strict=False):
            yield content[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)


class StoredLayer:
    """A layer's packed weights in host memory.

    Args:
        weights: The weights.
        pinned: Whether the host memory is pinned.
        piece_bytes: Bytes of the pieces that the bytes are kept in.

    Attributes:
        packed: The weights, which hold nothing before their bytes are copied to a slot that they use.
        pieces: The bytes, in consecutive tensors; the last may be shorter than the others.
    """

    def __init__(self, weights: Sequence[PackedWeight], pinned: bool = False, piece_bytes: int = PIECE_BYTES) -> None:
        self.packed = PackedLayer(weights)
        self.pieces = [
            torch.empty(len(own), dtype=torch.uint8, pin_memory=pinned).copy_(own)
            for own in self.packed.take(torch.device("cpu")).split(piece_bytes)
        ]

    def copy_to(self, out: torch.Tensor) -> None:
        """Copy the bytes to (bytes,) uint8, without waiting for a GPU."""
        for own, piece in zip(out.split([len(piece) for piece in self.pieces]), self.pieces, strict=True):
            own.copy_(piece, non_blocking=True)


class Slot:
    """Memory on the device for one layer at a time.

    Args:
        num_bytes: Bytes of the largest layer.
        device: The device.

    Attributes:
        content: The bytes of the layer.
        layer: Number of the layer that is there, or on its way; None at first.
        event: End of the copy, on a GPU.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.content = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        self.event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Have what follows wait until the layer is there."""
        if self.event is not None:
            torch.cuda.current_stream(self.content.device).wait_event(self.event)
            self.event = None
