"""Tensors on the host between forward and backward, copied while the device computes."""

import weakref
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

# Large enough for a bus' full rate. A power of two, as torch rounds pinned memory up to one: with a whole tensor in a
# buffer of its own, up to half of the host memory could be unused.
CHUNK_BYTES = 1 << 25


class HostStore:
    """Host memory for what layers keep of a forward, used again from step to step.

    Tensors are split over chunks of one size, so that steps of different lengths share them. On CUDA the chunks are
    pinned, and copies run on a stream of their own. That is the only stream that touches them: a chunk that is given
    to another tensor is not written before it was read.

    Args:
        device: That the tensors are on.
        chunk_bytes: Of host memory that is taken at a time.

    Attributes:
        num_chunks: Taken from the host so far; they are not given back.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.num_chunks = 0
        self._device, self._chunk_bytes = device, chunk_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[torch.Tensor] = []
        self._newest: weakref.ref[_Parked] | None = None

    @property
    def num_free(self) -> int:
        """Chunks that hold nothing."""
        return len(self._free)

    def hooks(self, tensor: torch.Tensor, stays: bool = False) -> saved_tensors_hooks:
        """Hooks under which one tensor, if it is saved, goes to the host; others stay where they are.

        Tensors are fetched in the reverse order of saving, each while what needs the one after it is computed.

        Args:
            tensor: On the store's device.
            stays: Leave it there, as the backward asks for it at once; those before it are still fetched ahead of time.
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
        """Chunks for so many bytes."""
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
        """Frees chunks for other tensors."""
        self._free += chunks

    def copy(self, tensor: torch.Tensor, chunks: list[torch.Tensor], to_host: bool) -> torch.cuda.Event | None:
        """Starts a copy between a tensor and its chunks.

        Returns:
            What happens when it is done; None if it is.
        """
        pieces = tensor.view(-1).view(torch.uint8).split(self._chunk_bytes)
        pairs = [(chunk[: len(piece)], piece) for chunk, piece in zip(chunks, pieces, strict=True)]
        if self._stream is None:
            for chunk, piece in pairs:
                chunk.copy_(piece) if to_host else piece.copy_(chunk)
            return None
        # To the host: the tensor is being computed. From it: what its memory was used for before may still be read.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for chunk, piece in pairs:
                chunk.copy_(piece, non_blocking=True) if to_host else piece.copy_(chunk, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Has the device, and not the host, wait for a copy before it goes on computing."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Parked:
    """A saved tensor: on the host, on the device, or on its way.

    Its memory on the device belongs to the stream that computes. It is let go of only after that stream was told to
    wait for the copy, and is then free for what is computed next, however far the host is ahead. With `record_stream`
    the host would have to see the copy done first, and until then take new memory for every layer.
    """

    def __init__(self, store: HostStore, tensor: torch.Tensor, previous: "_Parked | None", stays: bool) -> None:
        self._store, self._shape, self._dtype, self._device = store, tensor.shape, tensor.dtype, tensor.device
        # Weak, as a graph that is thrown away frees its tensors in any order.
        self._previous = None if previous is None else weakref.ref(previous)
        self._tensor: torch.Tensor | None = tensor
        self._chunks: list[torch.Tensor] = []
        self._event: torch.cuda.Event | None = None
        if not stays:
            self._chunks = store.take(tensor.nbytes)
            self._event = store.copy(tensor, self._chunks, to_host=True)

    def leave(self) -> None:
        """Frees the device's memory, if there is a copy on the host."""
        if self._chunks:
            self._store.wait(self._event)
            self._tensor = self._event = None

    def fetch(self) -> None:
        """Starts the way back."""
        if self._tensor is None:
            self._tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._event = self._store.copy(self._tensor, self._chunks, to_host=False)

    def arrive(self) -> torch.Tensor:
        """The tensor on the device; the one before it starts its way back."""
        self.fetch()
        tensor = self._tensor
        assert tensor is not None
        self.leave()
        previous = None if self._previous is None else self._previous()
        if previous is not None:
            previous.fetch()
        return tensor

    def __del__(self) -> None:
        self.leave()  # a backward that was given up leaves copies under way
        self._store.give_back(self._chunks)


def _unpack(packed: Any) -> torch.Tensor:
    return packed.arrive() if isinstance(packed, _Parked) else packed
