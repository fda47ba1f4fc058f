"""Saved tensors on the host between forward and backward, copied while the device computes."""

import weakref
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

# Large enough for the bus's full bandwidth, and a power of two, to which torch rounds pinned memory up: with a buffer
# per tensor, up to half of the pinned memory could be unused.
CHUNK_BYTES = 1 << 25


class HostStore:
    """Host memory for tensors that layers save in a forward, reused from step to step.

    Tensors are split over chunks of equal size, so that steps of different lengths share them. On CUDA the chunks are
    pinned, and copies run on a stream of their own. Only that stream touches them, so a chunk that is reused for
    another tensor is not overwritten before it has been read.

    Args:
        device: Device of the tensors.
        chunk_bytes: Size of a chunk.

    Attributes:
        num_chunks: Chunks allocated so far; they are kept until the store is deleted.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.num_chunks = 0
        self._device, self._chunk_bytes = device, chunk_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[torch.Tensor] = []
        self._newest: weakref.ref[_Parked] | None = None

    @property
    def num_free(self) -> int:
        """Number of unused chunks."""
        return len(self._free)

    def hooks(self, tensor: torch.Tensor, stays: bool = False) -> saved_tensors_hooks:
        """Return hooks that move one tensor to the host when it is saved; other saved tensors stay where they are.

        Tensors are fetched in the reverse order of saving, each during the backward of the layer after it.

        Args:
            tensor: The tensor, on the store's device.
            stays: Leave it on the device, because the backward needs it at once; earlier ones are still prefetched.
        """
        pointer = tensor.data_ptr()

        def pack(saved: torch.Tensor) -> Any:
            return self._park(saved.detach(), stays) if saved.data_ptr() == pointer else saved.detach()

        return saved_tensors_hooks(pack, _unpack)

    def _park(self, tensor: torch.Tensor, stays: bool) -> "_Parked":
        previous = None if self._newest is None else self._newest()
        if previous is not None:
            previous.leave()
        parked = _Parked(self, tensor.contiguous(), previous, stays)
        self._newest = weakref.ref(parked)
        return parked

    def take(self, num_bytes: int) -> list[torch.Tensor]:
        """Return chunks for a number of bytes."""
        count = -(-num_bytes // self._chunk_bytes)
        while len(self._free) < count:
            self._free.append(self._new_chunk())
            self.num_chunks += 1
        return [self._free.pop() for _ in range(count)]

    def _new_chunk(self) -> torch.Tensor:
        try:
            return torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        except RuntimeError as error:
            taken = self.num_chunks * self._chunk_bytes / 2**30
            raise torch.OutOfMemoryError(
                f"The host has no more memory for layer inputs than {taken:.1f} GiB."
            ) from error

    def give_back(self, chunks: list[torch.Tensor]) -> None:
        """Mark chunks as unused."""
        self._free += chunks

    def copy(self, tensor: torch.Tensor, chunks: list[torch.Tensor], to_host: bool) -> torch.cuda.Event | None:
        """Start a copy between a tensor and its chunks.

        Returns:
            An event that marks its end; None if it is done already.
        """
        pieces = tensor.view(-1).view(torch.uint8).split(self._chunk_bytes)
        pairs = [(chunk[: len(piece)], piece) for chunk, piece in zip(chunks, pieces, strict=True)]
        if self._stream is None:
            for chunk, piece in pairs:
                chunk.copy_(piece) if to_host else piece.copy_(chunk)
            return None
        # To the host: the tensor may still be in computation. From it: its memory may still be read in its last use.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for chunk, piece in pairs:
                chunk.copy_(piece, non_blocking=True) if to_host else piece.copy_(chunk, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Make the device, not the host, wait for a copy before it continues."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Parked:
    """A saved tensor: on the host, on the device, or being copied.

    Its device memory belongs to the computing stream. It is released only after that stream was told to wait for the
    copy, and is then free for the next operation, however far ahead the host is. With `record_stream`, the host would
    have to see the copy finished first, and would allocate new memory for every layer until then.
    """

    def __init__(self, store: HostStore, tensor: torch.Tensor, previous: "_Parked | None", stays: bool) -> None:
        self._store, self._shape, self._dtype, self._device = store, tensor.shape, tensor.dtype, tensor.device
        # Weak, because a discarded graph frees its tensors in any order.
        self._previous = None if previous is None else weakref.ref(previous)
        self._tensor: torch.Tensor | None = tensor
        self._chunks: list[torch.Tensor] = []
        self._event: torch.cuda.Event | None = None
        if not stays:
            self._chunks = store.take(tensor.nbytes)
            self._event = store.copy(tensor, self._chunks, to_host=True)

    def leave(self) -> None:
        """Release the device memory, if there is a copy on the host."""
        if self._chunks:
            self._store.wait(self._event)
            self._tensor = self._event = None

    def fetch(self) -> None:
        """Start the copy back to the device."""
        if self._tensor is None:
            self._tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._event = self._store.copy(self._tensor, self._chunks, to_host=False)

    def arrive(self) -> torch.Tensor:
        """Return the tensor on the device, and start fetching the one before it."""
        self.fetch()
        tensor = self._tensor
        assert tensor is not None
        self.leave()
        previous = None if self._previous is None else self._previous()
        if previous is not None:
            previous.fetch()
        return tensor

    def __del__(self) -> None:
        self.leave()  # an aborted backward leaves copies unfinished
        self._store.give_back(self._chunks)


def _unpack(packed: Any) -> torch.Tensor:
    return packed.arrive() if isinstance(packed, _Parked) else packed
