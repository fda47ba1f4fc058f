"""The merged weights of a mixture's experts, one expert at a time, in the layout of the base's files."""

from collections.abc import Collection, Iterator, Mapping

import torch

from qlora.lora import StoredExperts
from qlora.model import BaseWeights
from qlora.model.expert_files import ExpertTensors
from qlora.nf4 import BLOCK_SIZE, NF4, dequantize, quantize

# Experts whose merged weights are kept: the tensors of an expert's two products often alternate in the files.
KEPT = 2


class MergedExperts:
    """The tensors of merged experts by their names in the base's files, in fp32, each computed on demand.

    Args:
        base: The base's weights.
        tensors: The tensors of its experts.
        quantized: Names of the stacks that were quantized in training and are merged onto as training used them.
        adapted: Updates by the names of the stacks.
        device: Device to compute on.
        dtype: Compute dtype of training.
        double_quant: Whether the statistics were quantized too.
        block_size: Number of elements per 4-bit block.
    """

    def __init__(
        self,
        base: BaseWeights,
        tensors: Mapping[str, ExpertTensors],
        quantized: Collection[str],
        adapted: Mapping[str, StoredExperts],
        device: torch.device,
        dtype: torch.dtype,
        double_quant: bool = True,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self._base, self._quantized, self._adapted, self._device = base, quantized, adapted, device
        self._dtype, self._double_quant, self._block_size = dtype, double_quant, block_size
        self._places = {
            name: (own, pattern, expert if len(names) > 1 else None)
            for stack, own in tensors.items()
            if stack in quantized or stack in adapted
            for pattern, names in own.sources.items()
            for expert, name in enumerate(names)
        }
        self._kept: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield one tensor in blocks of its rows, in order: an expert each, in fp32 on the device."""
        tensors, pattern, expert = self._places[name]
        if expert is not None:
            yield self._parts(tensors, expert)[pattern]
            return
        for each in range(tensors.stack.shape[0]):
            yield self._parts(tensors, each)[pattern][None]

    def _parts(self, tensors: ExpertTensors, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors by pattern."""
        key = tensors.stack.name, expert
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = tensors.split(self._merged(tensors, expert))
        return self._kept[key]

    def _merged(self, tensors: ExpertTensors, expert: int) -> torch.Tensor:
        """Return an expert's merged weight as the model has it, (rows, columns), in fp32."""
        weight = tensors.read(self._base, expert).to(self._device)
        if tensors.stack.name in self._quantized:
            weight = weight.to(self._dtype)
            if self._base.expert_type == NF4:  # other types keep the values that are stored
                weight = dequantize(*quantize(weight, self._double_quant, self._block_size), self._dtype)
        weight = weight.float()
        update = self._adapted.get(tensors.stack.name)
        if update is None:
            return weight
        delta = update.delta(expert).to(self._device).to(torch.float32)
        return (delta.T if tensors.stack.is_transposed else delta).fold(weight)
