"""Where frozen weights are kept: what all places have in common, and the bytes that they take and copy."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

from qlora.errors import ModelError
from qlora.layers.recompute import checkpointed_layers
from qlora.layers.slots import NUM_SLOTS, PackedWeight
from qlora.nf4 import NF4Experts, NF4Linear

KINDS = ("device", "sharded", "host")


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

    def together(self, is_retried: bool = False) -> AbstractContextManager[None]:
        """Return a context in which processes may run a different number of passes; see :func:`uneven_passes`."""


class PlacedBytes(NamedTuple):
    """Bytes of placed weights, per process.

    Attributes:
        device: Bytes on the device all the time.
        host: Bytes in host memory.
        copied: Bytes that come to the device from elsewhere in the passes of a micro-batch.
        in_layers: Bytes on the device while layers compute, and not while the head does.
    """

    device: int
    host: int
    copied: int
    in_layers: int = 0


def placed_bytes(kind: str, layers: Sequence[int], num_processes: int, passes: str = "FB") -> PlacedBytes:
    """Return what placed weights take.

    Args:
        kind: `sharded` or `host`.
        layers: Bytes of each layer with packed weights.
        num_processes: Number of processes that share them.
        passes: Passes of a micro-batch through all layers in their order: `F` forward, `B` backward.
    """
    if kind == "sharded":
        part = -(-sum(layers) // num_processes)
        # The layer that computes, and two buffers: `fully_shard` keeps the one that it was gathered in until the next
        # layer is there.
        in_layers = min(NUM_SLOTS + 1, len(layers) + 1) * max(layers)
        return PlacedBytes(part, 0, len(passes) * (num_processes - 1) * part, in_layers)
    largest = min(NUM_SLOTS, len(layers)) * max(layers)
    # The last layers are there after a forward pass, and the first ones after a backward pass; a pass in the other
    # direction begins with them. Before the first pass comes the last one of the micro-batch before.
    there = {"FB": sum(layers[-NUM_SLOTS:]), "BF": sum(layers[:NUM_SLOTS])}
    pairs = [before + after for before, after in zip(passes[-1] + passes, passes, strict=False)]
    copied = sum(sum(layers) - there.get(pair, 0) for pair in pairs) if len(layers) > NUM_SLOTS else 0
    return PlacedBytes(largest, sum(layers), copied)


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


def uneven_passes(model: Any, is_retried: bool = False) -> AbstractContextManager[None]:
    """Return a context in which processes may run a different number of passes through a model; all leave it together.

    Only of sharded weights does a process need what the others hold.

    Args:
        model: The model.
        is_retried: Whether all processes retry together if memory runs out on some; otherwise it ends the run, see
            :meth:`qlora.layers.sharding.ShardedWeights.together`.
    """
    placed = placed_weights(model)
    return nullcontext() if placed is None else placed.together(is_retried)
