"""The merged weights of a mixture's experts, computed a second time by other code than merge's.

Merge runs transformers' converters backwards. Here each value is followed forwards: the positions of the files' values
are loaded in their place, which tells where each of them is in the model's weight.
"""

import math
from collections.abc import Collection

import torch

from qlora.model import BaseWeights
from qlora.model.expert_files import ExpertTensors
from qlora.nf4 import NF4Experts


class ExpectedExperts:
    """The tensors of experts in 4 bits by their names in the base's files, dequantized as training used them.

    Args:
        base: The base's weights.
        tensors: The tensors of its experts.
        quantized: Names of the stacks that were quantized in training.
        device: Device to quantize on.
        dtype: Compute dtype of training.
        double_quant: Whether the statistics were quantized too.
    """

    def __init__(
        self,
        base: BaseWeights,
        tensors: dict[str, ExpertTensors],
        quantized: Collection[str],
        device: torch.device,
        dtype: torch.dtype,
        double_quant: bool,
    ) -> None:
        self._base, self._device, self._dtype, self._double_quant = base, device, dtype, double_quant
        self._tensors = {name: own for stack, own in tensors.items() if stack in quantized for name in own.names}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def base_weight(self, name: str) -> torch.Tensor:
        """Return a whole tensor of the files as training used it, in the compute dtype on the CPU."""
        tensors = self._tensors[name]
        expert = tensors.expert_of(name)
        if expert is not None:
            return self._in_file(tensors, expert, name, self._trained_on(tensors, expert))
        experts = range(tensors.stack.shape[0])
        return torch.stack([self._in_file(tensors, each, name, self._trained_on(tensors, each))[0] for each in experts])

    def _trained_on(self, tensors: ExpertTensors, expert: int) -> torch.Tensor:
        """Return an expert's weight in the model, quantized and dequantized by the code that trains."""
        weight = tensors.read(self._base, expert).to(self._device, self._dtype)
        return NF4Experts.from_weight(weight[None], self._double_quant).dequantize(0, self._dtype).cpu()

    def _in_file(self, tensors: ExpertTensors, expert: int, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the values of an expert's weight that are in a tensor of the files, in that tensor's order."""
        positions = _Positions(self._base, tensors, expert)
        places = tensors.read(positions, expert).flatten()
        in_order = torch.empty(len(places), dtype=weight.dtype)
        in_order[places] = weight.flatten()
        start, shape = positions.starts[name], positions.shape(name)
        return in_order[start : start + math.prod(shape)].view(shape)


class _Positions:
    """The tensors of one expert, with the position of each value in place of it."""

    def __init__(self, base: BaseWeights, tensors: ExpertTensors, expert: int) -> None:
        self.shapes = base.shapes
        names = [own[expert] if len(own) > 1 else own[0] for own in tensors.sources.values()]
        self._is_single = {name: len(own) > 1 for name, own in zip(names, tensors.sources.values(), strict=True)}
        self.starts, start = dict[str, int](), 0
        for name in names:
            self.starts[name] = start
            start += math.prod(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the part of a tensor that is this expert's."""
        return self.shapes[name] if self._is_single[name] else (1, *self.shapes[name][1:])

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Return the positions of this expert's values among all its values."""
        shape = self.shape(name)
        return torch.arange(self.starts[name], self.starts[name] + math.prod(shape)).view(shape)
