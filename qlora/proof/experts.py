"""The merged weights of a mixture's experts, computed a second time by other code than merge's.

Merge runs transformers' converters backwards. Here each value is followed forwards: the positions of the files' values
are loaded in their place, which tells where each of them is in the model's weight.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from qlora.lora import StoredExperts
from qlora.lora.mixture import projections
from qlora.model import BaseWeights
from qlora.model.expert_files import ExpertTensors
from qlora.nf4 import NF4Experts


class ExpectedExperts:
    """The tensors of experts that are in 4 bits or adapted, by their names in the base's files.

    Args:
        base: The base's weights.
        tensors: The tensors of its experts.
        quantized: Names of the stacks that are used as training dequantized them; others as they are in the files.
        adapted: Updates by the names of the stacks.
        scaling_of: Returns the factor on the update of a stack, by the run's config.
        device: Device to quantize on.
        dtype: Compute dtype of training.
        double_quant: Whether the statistics were quantized too.
    """

    def __init__(
        self,
        base: BaseWeights,
        tensors: dict[str, ExpertTensors],
        quantized: Collection[str],
        adapted: Mapping[str, StoredExperts],
        scaling_of: Callable[[str], float],
        device: torch.device,
        dtype: torch.dtype,
        double_quant: bool,
    ) -> None:
        self._base, self._device, self._dtype, self._double_quant = base, device, dtype, double_quant
        self._quantized, self._adapted, self._scaling_of = quantized, adapted, scaling_of
        self._stacks = tensors
        self._tensors = {name: own for own in tensors.values() for name in own.names}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def is_quantized(self, name: str) -> bool:
        """Return whether a tensor is used as training dequantized it."""
        return name in self._tensors and self._tensors[name].stack.name in self._quantized

    def is_adapted(self, name: str) -> bool:
        """Return whether an update is added to a tensor."""
        return name in self._tensors and self._tensors[name].stack.name in self._adapted

    def base_weight(self, name: str) -> torch.Tensor:
        """Return a whole tensor of the files as training used it, in the compute dtype on the CPU."""
        return self._whole(name, slice(None), self._trained_on)

    def update(self, name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows of what is added to a tensor of the files, in fp64, and of a bound on the error of its sums.

        Args:
            name: Name of the tensor.
            rows: The rows along its first dimension, which is the experts' if it holds all of them.
        """
        return self._whole(name, rows, self._update), self._whole(name, rows, self._bound)

    @property
    def adapted(self) -> Collection[str]:
        """Names of the adapted stacks."""
        return self._adapted.keys()

    def weights(self, stack: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an expert's weight in the model and what is added to it, (out, in) and fp64 each."""
        tensors = self._stacks[stack]
        base = self._trained_on(tensors, expert) if stack in self._quantized else tensors.read(self._base, expert)
        base = base.double()
        update = self._update(tensors, expert) if stack in self._adapted else torch.zeros_like(base)
        return (base.T, update.T) if tensors.stack.is_transposed else (base, update)

    def _whole(self, name: str, rows: slice, weight_of: Callable[[ExpertTensors, int], torch.Tensor]) -> torch.Tensor:
        """Return rows of a tensor of the files, given the function that computes an expert's weight in the model."""
        tensors = self._tensors[name]
        expert = tensors.expert_of(name)
        if expert is not None:
            return self._in_file(tensors, expert, name, weight_of(tensors, expert))[rows]
        experts = range(*rows.indices(tensors.stack.shape[0]))
        return torch.stack([self._in_file(tensors, each, name, weight_of(tensors, each))[0] for each in experts])

    def _update(self, tensors: ExpertTensors, expert: int) -> torch.Tensor:
        """Return what is added to an expert's weight in the model, fp64."""
        A, B = self._factors(tensors, expert)
        update = B @ A
        return update.T if tensors.stack.is_transposed else update

    def _bound(self, tensors: ExpertTensors, expert: int) -> torch.Tensor:
        """Return a bound on the error of its sums in fp32: each is of rank products (Cauchy-Schwarz)."""
        A, B = self._factors(tensors, expert)
        size = torch.outer(B.norm(dim=1), A.norm(dim=0)) * (len(A) + 1) * 2.0**-24
        return size.T if tensors.stack.is_transposed else size

    def _factors(self, tensors: ExpertTensors, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        name = tensors.stack.name
        stored = self._adapted[name]
        return stored.A[expert].double(), stored.B[expert].double() * self._scaling_of(name)

    def _trained_on(self, tensors: ExpertTensors, expert: int) -> torch.Tensor:
        """Return an expert's weight in the model, quantized and dequantized by the code that trains."""
        weight = tensors.read(self._base, expert).to(self._device, self._dtype)
        experts = NF4Experts.from_weight(
            weight[None], self._double_quant, self._base.expert_type, tensors.stack.is_transposed
        )
        found = experts.dequantize(0, self._dtype).cpu()
        return found.T if experts.is_flipped else found

    def _in_file(self, tensors: ExpertTensors, expert: int, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the values of an expert's weight that are in a tensor of the files, in that tensor's order."""
        positions = _Positions(self._base, tensors, expert)
        places = tensors.read(positions, expert).flatten()
        in_order = torch.empty(len(places), dtype=weight.dtype)
        in_order[places] = weight.reshape(-1)
        start, shape = positions.starts[name], positions.shape(name)
        return in_order[start : start + math.prod(shape)].view(shape)


@torch.no_grad()
def expert_outputs(
    name: str, layer: Any, expected: ExpectedExperts, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Compute a layer of experts in fp64.

    Args:
        name: Name of the layer.
        layer: The layer, whose gate and biases are used.
        expected: The weights of the experts.
        inputs: What the layer got: hidden states, the experts of each token, and their scores.

    Returns:
        The outputs, (tokens, hidden); the same without the updates of the weights; and the norm of all terms that are
        summed.
    """
    hidden, index, scores = (tensor.cpu() for tensor in inputs)
    x, weights = hidden.double(), scores.double()
    first, second = projections(layer)
    gate = layer._apply_gate if layer.has_gate else layer.act_fn
    biases = [
        getattr(layer, f"{part}_bias").double().cpu() if getattr(layer, "has_bias", False) else None
        for part in (first, second)
    ]
    with_update, without = torch.zeros_like(x), torch.zeros_like(x)
    squares = 0.0
    for expert in index.unique().tolist():
        tokens, places = (index == expert).nonzero(as_tuple=True)
        score = weights[tokens, places][:, None]
        up, down = (expected.weights(f"{name}.{part}", expert) for part in (first, second))
        for total, is_updated in ((with_update, True), (without, False)):
            middle = gate(F.linear(x[tokens], up[0] + is_updated * up[1], _row(biases[0], expert)))
            output = score * F.linear(middle, down[0] + is_updated * down[1], _row(biases[1], expert))
            total[tokens] += output  # each token once
            squares += output.square().sum().item() * is_updated
    return with_update, without, squares**0.5


def _row(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias is None else bias[expert]


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
