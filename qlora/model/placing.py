"""A base whose weights are placed while it is loaded, a layer at a time."""

from collections.abc import Mapping
from typing import Any

import torch

from qlora.errors import ModelError
from qlora.layers.experts import take_over_experts
from qlora.layers.host_weights import HostWeights
from qlora.layers.placement import KINDS, Placement, packed_weights
from qlora.layers.recompute import checkpointed_layers
from qlora.layers.sharding import ShardedWeights
from qlora.model.quantization import LoadingAborted
from qlora.nf4 import NF4Experts, NF4Linear, is_bitsandbytes_linear
from qlora.processes import Processes


def make_placement(kind: str, quantization: str, device: torch.device, processes: Processes | None) -> Placement | None:
    """Return where a base's weights will be; None if that is its device.

    Args:
        kind: One of :data:`qlora.layers.placement.KINDS`.
        quantization: How the base is quantized.
        device: Device that computes.
        processes: Processes that share the weights; None for this one alone.

    Raises:
        ModelError: The kind is unknown, or not possible with these.
    """
    if kind not in KINDS:
        raise ModelError(f"weights: {kind!r} should be one of {', '.join(KINDS)}.")
    if kind == "device":
        return None
    if quantization == "none":
        raise ModelError(
            f"model.weights: {kind} is for weights in 4 bits, but model.quantization is none; set it to nf4, or "
            "model.weights to device."
        )
    if kind == "host":
        return HostWeights(device)
    if processes is None or processes.world_size == 1:
        raise ModelError(
            "model.weights: sharded splits the weights over processes, but there is one; launch several with torchrun "
            "or accelerate launch, or set it to host."
        )
    return ShardedWeights(device, processes)


def place_complete_layers(placed: Placement, model: Any, experts: Mapping[str, NF4Experts]) -> None:
    """Place the layers of a model that is being loaded whose weights are all there.

    Args:
        placed: Where they go.
        model: The model that transformers is loading; the 4-bit linears of a placed layer become `NF4Linear`s, and its
            quantized experts `NF4Experts`.
        experts: Experts that are quantized already, by the full names of their parameters.

    Raises:
        LoadingAborted: A layer can't be placed.
    """
    place = "the model"
    try:
        names = {module: name for name, module in model.named_modules()}
        for index, layer in enumerate(checkpointed_layers(model)):
            place = names[layer]
            if placed.has(index) or any(parameter.is_meta for parameter in layer.parameters()):
                continue
            take_over_linears(model, place)
            take_over_experts(model, experts, place)
            weights = packed_weights(layer)
            if weights:
                placed.store(index, layer, weights)
    except Exception as error:  # torch raises errors of many types
        raise LoadingAborted(f"{place}: {error}") from error


def take_over_linears(model: Any, inside: str = "") -> None:
    """Replace bitsandbytes' own layers by `NF4Linear`.

    Args:
        model: A model of transformers.
        inside: Name of the module whose layers are replaced; all by default.
    """
    for name, module in list(model.get_submodule(inside).named_modules(prefix=inside)):
        if is_bitsandbytes_linear(module):
            model.set_submodule(name, NF4Linear.from_linear(module))
            # The weight refers back to its layer, so both would hold the codes until garbage is collected.
            del module.weight
