"""Frozen weights in host memory, two layers on the device at a time.

The packed weights of a layer and their statistics are one run of bytes. Two slots of device memory hold two layers;
every weight of a layer is a view of its layer's slot, and reading a weight fetches the layer. The next layer is copied
while the current one computes. `torch.distributed.fsdp.fully_shard` with `CPUOffloadPolicy` could do this as well, but
with one process it copies on the stream that computes, so that nothing overlaps (`FSDPParamGroup.unshard` of torch 2.13
skips its own streams if the group has one process).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from qlora.layers.slots import NUM_SLOTS, PackedWeight, Slot, StoredLayer


class HostWeights:
    """The packed weights of a model's layers in host memory, of which two layers at a time are on the device.

    Args:
        device: Device that computes.

    Attributes:
        kind: Where the weights are kept.
        num_fetched: Number of layers that came to a slot so far.
    """

    kind = "host"

    def __init__(self, device: torch.device) -> None:
        self.num_fetched = 0
        self._device = device
        self._stored: dict[int, StoredLayer] = {}
        self._layers: list[StoredLayer] = []
        self._slots: list[Slot] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last = -1

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of each layer, in the model's order."""
        return [layer.packed.num_bytes for layer in self._layers]

    @property
    def stored_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(self.layer_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes on the device that layers come to."""
        return sum(slot.content.nbytes for slot in self._slots)

    def has(self, index: int) -> bool:
        """Return whether a layer of the model is stored."""
        return index in self._stored

    @torch.no_grad()
    def store(self, index: int, layer: Any, weights: Sequence[PackedWeight]) -> None:
        """Take over the weights of a layer; they can be read again after :meth:`finish`.

        Args:
            index: Index of the layer in the model.
            layer: The layer, which is not changed.
            weights: Its packed weights.
        """
        self._stored[index] = StoredLayer(weights, pinned=self._device.type == "cuda")

    @torch.no_grad()
    def finish(self, model: Any) -> None:
        """Allocate the slots, make all stored weights readable, and move the rest of the model to the device."""
        self._layers = [layer for _, layer in sorted(self._stored.items())]
        most = max(self.layer_bytes)
        self._slots = [Slot(most, self._device) for _ in self._layers[:NUM_SLOTS]]
        for number, layer in enumerate(self._layers):
            layer.packed.use(self._slot(number).content)
            layer.packed.fetch_by(partial(self.need, number))
        model.to(self._device)  # now, because the weights' stand-ins would become as large as the weights

    def need(self, number: int) -> None:
        """Fetch a layer to its slot if it is not there, and start to fetch the one that is read after it."""
        slot = self._slot(number)
        if slot.layer != number:
            self._fetch(number)
        slot.wait()
        if number == self._last:
            return
        # Layers are read upwards in a forward pass and downwards in a backward pass.
        following = number - 1 if 0 < number < self._last else number + 1
        self._last = number
        if following < len(self._layers) and self._slot(following).layer != following:
            self._fetch(following)

    def together(self, is_retried: bool = False) -> AbstractContextManager[None]:
        """Return a context without effect: each process has its own weights."""
        return nullcontext()

    def _fetch(self, number: int) -> None:
        slot, layer = self._slot(number), self._layers[number]
        content = slot.content[: layer.packed.num_bytes]
        slot.wait()
        slot.layer = number
        self.num_fetched += 1
        if self._stream is None:
            layer.copy_to(content)
            return
        # The slot's memory may still be read by the layer that was there.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            layer.copy_to(content)
            slot.event = self._stream.record_event()

    def _slot(self, number: int) -> Slot:
        return self._slots[number % len(self._slots)]
