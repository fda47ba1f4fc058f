"""Frozen weights in host memory, two layers on the device at a time; and what all placements share.

The packed weights of a layer and their statistics are one run of bytes. Two slots of device memory hold two layers;
every weight of a layer is a view of its layer's slot, and reading a weight fetches the layer. The next layer is copied
while the current one computes. `torch.distributed.fsdp.fully_shard` with `CPUOffloadPolicy` could do this as well, but
with one process it copies on the stream that computes, so that nothing overlaps (`FSDPParamGroup.unshard` of torch 2.13
skips its own streams if the group has one process).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from qlora.errors import ModelError
from qlora.layers.recompute import checkpointed_layers
from qlora.layers.slots import PackedWeight, Slot, StoredLayer
from qlora.nf4 import NF4Experts, NF4Linear

KINDS = ("device", "sharded", "host")
NUM_SLOTS = 2


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
        return [layer.num_bytes for layer in self._layers]

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
            layer.use(self._slot(number).content, partial(self.need, number))
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

    def together(self) -> AbstractContextManager[None]:
        """Return a context without effect: each process has its own weights."""
        return nullcontext()

    def _fetch(self, number: int) -> None:
        slot, layer = self._slot(number), self._layers[number]
        content = slot.content[: layer.num_bytes]
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


class Placement(Protocol):
    """Where weights are kept: `HostWeights` or `ShardedWeights`."""

    kind: str

    @property
    def stored_bytes(self) -> int:
        """Bytes that this process keeps."""

    def has(self, index: int) -> bool:
        """Return whether a layer of the model is stored."""

    def store(self, index: int, layer: Any, weights: Sequence[PackedWeight]) -> None:
        """Take over the packed weights of a layer."""

    def finish(self, model: Any) -> None:
        """Make all stored weights readable."""

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which processes may run a different number of passes."""


class PlacedBytes(NamedTuple):
    """Bytes of placed weights, per process.

    Attributes:
        device: Bytes on the device all the time.
        host: Bytes in host memory.
        copied: Bytes that come to the device from elsewhere in a forward and a backward pass through all layers.
        in_layers: Bytes on the device while layers compute, and not while the head does.
    """

    device: int
    host: int
    copied: int
    in_layers: int = 0


def placed_bytes(kind: str, layers: Sequence[int], num_processes: int, statistics_share: float = 0.0) -> PlacedBytes:
    """Return what placed weights take.

    Args:
        kind: `sharded` or `host`.
        layers: Bytes of each layer with packed weights.
        num_processes: Number of processes that share them.
        statistics_share: Share of the bytes that are the codes' statistics, which are not split.
    """
    if kind == "sharded":
        statistics = int(statistics_share * sum(layers))
        part = -(-(sum(layers) - statistics) // num_processes)
        # The layer that computes, and two buffers: `fully_shard` keeps the one that it was gathered in until the next
        # layer is there.
        in_layers = min(NUM_SLOTS + 1, len(layers) + 1) * max(layers)
        return PlacedBytes(statistics + part, 0, 2 * (num_processes - 1) * part, in_layers)
    largest = min(NUM_SLOTS, len(layers)) * max(layers)
    # The last layers are there after a forward pass, and the first ones after a backward pass.
    copied = 2 * sum(layers) - sum(layers[:NUM_SLOTS]) - sum(layers[-NUM_SLOTS:])
    return PlacedBytes(largest, sum(layers), max(copied, 0))


def packed_weights(layer: Any) -> list[PackedWeight]:
    """Return the weights of a layer that can be placed, in the layer's order."""
    return [module for module in layer.modules() if isinstance(module, NF4Linear | NF4Experts)]


def place_weights(model: Any, placed: Placement) -> None:
    """Place the packed weights of a model's layers, in place; what is in 16 bits stays on the device.

    Args:
        model: A model of transformers, whose layers' weights are in 4 bits.
        placed: Where they go; it may have taken some layers already.

    Raises:
        ModelError: The model has no layers that can be placed.
    """
    has_any = False
    for index, layer in enumerate(checkpointed_layers(model)):
        weights = packed_weights(layer)
        has_any |= bool(weights)
        if weights and not placed.has(index):
            placed.store(index, layer, weights)
    if not has_any:
        raise ModelError(
            f"model.weights: {placed.kind} places the 4-bit weights of layers, but {type(model).__name__} has none in "
            "layers of transformers' GradientCheckpointingLayer; set it to device."
        )
    placed.finish(model)
    model.placed_weights = placed


def placed_weights(model: Any) -> Placement | None:
    """Return where a model's weights are placed; None if they are on its device."""
    return getattr(model, "placed_weights", None)


def uneven_passes(model: Any) -> AbstractContextManager[None]:
    """Return a context in which processes may run a different number of passes through a model; all leave it together.

    Only of sharded weights does a process need what the others hold.
    """
    placed = placed_weights(model)
    return nullcontext() if placed is None else placed.together()
