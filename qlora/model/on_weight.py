"""Replacing weights by others while a base is loaded, before they are quantized."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qlora.errors import ModelError
from qlora.files.stored import LazyTensor
from qlora.model.quantization import QuantizedLayer

# Takes a layer's name and its weight, (out, in); returns the weight to quantize instead.
OnWeight = Callable[[str, torch.Tensor], torch.Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def replace_when_read(
    tensors: Mapping[str, LazyTensor], layers: Mapping[str, QuantizedLayer], on_weight: OnWeight
) -> dict[str, Any]:
    """Replace the weight of each layer by what `on_weight` returns, when its tensor is read.

    Args:
        tensors: All tensors by their names in the files, not read yet.
        layers: The layers whose weights are replaced, by the names of their tensors.
        on_weight: Called once for each layer, in the order of reading.

    Returns:
        All tensors by their names in the files.
    """
    replaced = {name: _ReplacedWeight(tensors[name], layer, on_weight) for name, layer in layers.items()}
    return {**tensors, **replaced}


class _ReplacedWeight:
    """A stored tensor that is read and replaced when it is indexed."""

    def __init__(self, stored: LazyTensor, layer: QuantizedLayer, on_weight: OnWeight) -> None:
        self._stored, self._layer, self._on_weight = stored, layer, on_weight

    def get_shape(self) -> list[int]:
        """Return the shape as stored."""
        return self._stored.get_shape()

    def get_dtype(self) -> str:
        """Return the stored dtype as safetensors names it."""
        return self._stored.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        stored = self._stored[...]
        weight = self._replace(stored.T if self._layer.is_transposed else stored)
        return (weight.T if self._layer.is_transposed else weight)[index]

    def _replace(self, weight: torch.Tensor) -> torch.Tensor:
        name, shape = self._layer.name, tuple(weight.shape)
        try:
            replacement = self._on_weight(name, weight)
        except Exception as error:  # loading would otherwise report it without the layer
            raise ModelError(f"on_weight failed for {name}: {type(error).__name__}: {error}") from error
        if not isinstance(replacement, torch.Tensor):
            raise ModelError(
                f"on_weight returned {replacement!r:.80} for {name}; return the tensor of shape {shape} to quantize."
            )
        if tuple(replacement.shape) != shape:
            raise ModelError(
                f"on_weight returned a tensor of shape {tuple(replacement.shape)} for {name}; return one of {shape}."
            )
        if replacement.dtype not in DTYPES:
            raise ModelError(
                f"on_weight returned a tensor in {replacement.dtype} for {name}; return one in 16 or 32 bits: "
                f"{', '.join(map(str, DTYPES))}."
            )
        if not replacement.isfinite().all():
            raise ModelError(f"on_weight returned values that are not finite for {name}.")
        return replacement.detach()
