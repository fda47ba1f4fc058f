"""LoraExperts: the frozen experts of a layer's projection with a trainable update of each expert's weight."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.kernels import ExpertGroup, LowRank, weights_of_group
from qlora.lora.linear import draw
from qlora.lora.mixture import expert_stacks, experts_per_token
from qlora.lora.spec import AdapterSpec, by_pattern

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """An adapter of the experts of one projection: the effective weight of expert e is W[e] + scaling · B[e] A[e].

    Attributes:
        A: (experts, rank, in).
        B: (experts, out, rank).
        scaling: Factor on the products.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    def delta(self, expert: int) -> LowRank:
        """Return the term that is added to an expert's weight, (out, in)."""
        return LowRank(self.A, self.B, self.scaling).at(expert)


class PlainExperts(nn.Module):
    """The experts of a projection as transformers holds them, not quantized.

    Args:
        weight: (experts, rows, columns).
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    @property
    def shape(self) -> torch.Size:
        """(experts, rows, columns)."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weight.device

    def weights_for_product(
        self, group: ExpertGroup, dtype: torch.dtype, update: LowRank | None = None
    ) -> torch.Tensor:
        """Return the weights of a group of experts with terms added, (experts, rows, columns), in `dtype`.

        See :class:`qlora.lora.expert_products.ExpertWeights`.
        """
        return weights_of_group(self.weight, group, dtype, update)


class LoraExperts(nn.Module):
    """The experts of a projection, each with an update scaling · B A of its weight, which is zero at first.

    Args:
        base: The frozen experts: `NF4Experts` or :class:`PlainExperts`.
        spec: Rank and scaling of the update, plain LoRA without dropout.
        is_transposed: Whether an expert's weight is (in, out) instead of (out, in).

    Attributes:
        is_off: Whether the experts compute what their base does.
        is_at_start: Whether they compute what they did at first.
        kept: Initial A and B, as far as these are needed and the update was not zero at first.
    """

    def __init__(self, base: Any, spec: AdapterSpec, is_transposed: bool) -> None:
        super().__init__()
        self.base, self.spec, self.is_transposed = base, spec, is_transposed
        self.is_off = self.is_at_start = False
        self.kept: tuple[torch.Tensor, ...] = ()
        for name, shape in factor_shapes(spec, base.shape, is_transposed).items():
            values = torch.zeros(shape, dtype=spec.dtype, device=base.weight.device)
            self.register_parameter(name, nn.Parameter(values, requires_grad=spec.trains(name)))

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, rows, columns) of the weights."""
        return tuple(self.base.shape)

    @property
    def numel(self) -> int:
        """Number of weights of all experts."""
        experts, rows, columns = self.shape
        return experts * rows * columns

    @property
    def factors(self) -> tuple[torch.Tensor, ...]:
        """A, (experts, rank, in), and B, (experts, out, rank), of the update that is added now; empty if none is."""
        if self.is_off:
            return ()
        return self.kept if self.is_at_start else (self.lora_A, self.lora_B)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw A for each expert on the CPU, and set B to zero.

        Args:
            generator: A CPU generator.
        """
        experts, rank, in_features = self.lora_A.shape
        for expert in range(experts):
            self.lora_A[expert].copy_(draw(self.spec.init, rank, in_features, generator))
        self.lora_B.zero_()

    @torch.no_grad()
    def stored(self) -> StoredExperts:
        """Return the adapter's factors."""
        return StoredExperts(self.lora_A.detach(), self.lora_B.detach(), self.spec.scaling)

    @torch.no_grad()
    def dead(self) -> list[int]:
        """Return the experts whose update is still zero: no token of the training data has reached them."""
        return (~self.lora_B.flatten(1).any(1)).nonzero().flatten().tolist()

    def extra_repr(self) -> str:
        """Return rank and scaling."""
        return f"rank={self.spec.rank}, scaling={self.spec.scaling:g}"


def describe_dead_experts(model: nn.Module) -> list[str]:
    """Return a line if experts of a trained model were never adapted, because no token reached them."""
    dead, sizes = dict[str, set[int]](), dict[str, int]()
    for name, stack in lora_experts(model):
        layer = name.rpartition(".")[0]
        sizes[layer] = stack.shape[0]
        dead[layer] = {*stack.dead()} & dead.get(layer, {*range(stack.shape[0])})
    first = next((layer for layer, experts in dead.items() if experts), None)
    if first is None:
        return []
    return [
        f"{sum(map(len, dead.values())):,} of {sum(sizes.values()):,} experts got no token of the training data, so "
        f"they are as in the base; the first is expert {min(dead[first])} of {first}."
    ]


def factor_shapes(spec: AdapterSpec, shape: Sequence[int], is_transposed: bool) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of the factors of a stack of experts, (experts, rows, columns)."""
    experts, rows, columns = shape
    out_features, in_features = (columns, rows) if is_transposed else (rows, columns)
    return {"lora_A": (experts, spec.rank, in_features), "lora_B": (experts, out_features, spec.rank)}


def lora_experts(model: nn.Module) -> Iterator[tuple[str, LoraExperts]]:
    """Yield the adapted stacks of experts of a model with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraExperts):
            yield name, module


def check_rank(asked: int | str, model: nn.Module) -> None:
    """Check the rank that is asked for experts.

    Args:
        asked: `auto`, or a number; 0 for none.
        model: The model.

    Raises:
        ModelError: It is neither, or a number for a model without experts that can be adapted.
    """
    if asked != AUTO and (type(asked) is not int or asked < 0):
        raise ModelError(f"lora.expert_rank: {asked!r} should be 'auto' or a whole number from 0.")
    if asked not in (AUTO, 0) and not expert_stacks(model):
        raise ModelError(
            f"lora.expert_rank: {asked} has no effect, as {type(model).__name__} has no experts that can be adapted; "
            "remove it."
        )


def rank_of_experts(asked: int | str, rank: int, model: nn.Module) -> int:
    """Return the rank of experts' factors: `auto` gives as many trained values per token as `rank` in a dense layer.

    Args:
        asked: `auto`, or a number; see :func:`check_rank`.
        rank: Rank of the other layers.
        model: The model.

    Raises:
        ModelError: `auto` can't be computed.
    """
    return max(1, rank // experts_per_token(model)) if asked == AUTO else int(asked)


def specs_with_rank(
    spec: AdapterSpec, names: Sequence[str], rank: int, given: Mapping[str, int] = MappingProxyType({})
) -> dict[str, AdapterSpec]:
    """Return the spec of each stack of experts, with the scaling of other layers.

    Patterns mean what they mean for other layers: the scaling is alpha divided by the pattern's rank, or by its root
    with rsLoRA.

    Args:
        spec: Spec of the other layers, with patterns.
        names: Names of the stacks.
        rank: Rank of the experts' factors by the config.
        given: Ranks of stacks that start from factors, by their names; they change no scaling.

    Raises:
        ModelError: The adapter is of a kind that experts can't have; names all reasons.
    """
    problems = expert_problems(spec)
    if problems:
        raise ModelError("lora.expert_rank: experts take plain LoRA:\n" + "\n".join(f"  {each}" for each in problems))
    plain = replace(spec, rank_pattern={}, alpha_pattern={})
    specs = {}
    for name in names:
        own_rank = by_pattern(spec.rank_pattern, name, None)
        own = plain.with_rank(rank) if own_rank is None else replace(plain, rank=own_rank)
        alpha = by_pattern(spec.alpha_pattern, name, None)
        own = own if alpha is None else replace(own, alpha=alpha)
        specs[name] = own.with_rank(given.get(name, own.rank))
    return specs


def expert_problems(spec: AdapterSpec) -> list[str]:
    """Return a line for each setting of an adapter that experts can't have, with the remedy."""
    wrong = {
        f"lora.kind: {spec.kind} is for linear layers": spec.kind != "lora",
        f"lora.dropout: {spec.dropout} is applied to an adapter's input, and experts' updates are added to the weight "
        "instead": bool(spec.dropout),
        f"lora.init: {spec.init} is computed for linear layers": spec.init not in ("kaiming", "gaussian", "orthogonal"),
    }
    return [f"{problem}; change it, or set lora.expert_rank: 0" for problem, is_wrong in wrong.items() if is_wrong]


def reset_experts(model: nn.Module, seed: int) -> None:
    """Set the initial values of all adapted experts of a model.

    Args:
        model: A model with adapted experts.
        seed: Seed of the initial values.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # other numbers than those of the linear layers
    for _, layer in lora_experts(model):
        layer.reset(generator)
