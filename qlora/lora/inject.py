"""Selects the linear layers of a model that get an adapter, and wraps them."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.lora.direct import read_directly
from qlora.lora.expert_layer import wrap_experts
from qlora.lora.experts import AUTO, check_rank, lora_experts, rank_of_experts, reset_experts, specs_with_rank
from qlora.lora.head import output_head
from qlora.lora.linear import LoraLinear
from qlora.lora.match import matches, other_part, unmatched
from qlora.lora.mixture import expert_stacks, routers
from qlora.lora.plain import is_linear
from qlora.lora.spec import COMPUTED_INITS, AdapterSpec
from qlora.lora.text_part import text_part

ALL_LINEAR = "all-linear"
# The index of a layer in a module's name: the first number, as in `model.layers.3.self_attn.q_proj`.
LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the adapted layers of a model with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@dataclass(frozen=True, slots=True)
class Targets:
    """Which linear layers of a model are adapted.

    Attributes:
        names: `all-linear` (every linear but the output head), or one or more full names, last parts of names
            (`q_proj`), or regular expressions that match a full name. Layers that :func:`read_directly` returns are
            left out, and so are routers of experts.
        exclude: Layers that are left out, given like `names`.
        layers: Indices of the decoder layers whose linears are adapted; None for all.
    """

    names: str | Sequence[str] = ALL_LINEAR
    exclude: Sequence[str] = ()
    layers: Collection[int] | None = None


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, in the model's order; of a multimodal one, those of text."""
    text = text_part(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and (text is None or not text.is_outside(name))
    }


def match_targets(model: nn.Module, targets: Targets | str | Sequence[str]) -> list[str]:
    """Return the names of the linear layers that `targets` asks for, in the model's order.

    Args:
        model: A model whose linear layers are `nn.Linear` or any module with `dequantize`.
        targets: The layers, or only their names as in :class:`Targets`.

    Raises:
        ModelError: The model has no linear layer, a target matches none (all such targets at once), or the head.
    """
    linears = linear_layers(model)
    return [name for name in _match(model, targets) if name in linears]


def match_experts(model: nn.Module, targets: Targets | str | Sequence[str]) -> list[str]:
    """Return the names of the stacks of experts that `targets` asks for, in the model's order.

    Args:
        model: A model; without experts, none is found.
        targets: See :func:`match_targets`. A stack is named like `model.layers.0.mlp.experts.gate_up_proj`.

    Raises:
        ModelError: See :func:`match_targets`.
    """
    stacks = expert_stacks(model)
    return [name for name in _match(model, targets) if name in stacks] if stacks else []


def _match(model: nn.Module, targets: Targets | str | Sequence[str]) -> list[str]:
    """Return the names of the linear layers and stacks of experts that `targets` asks for."""
    given = targets if isinstance(targets, Targets) else Targets(targets)
    named = _match_names(model, given.names)
    left_out = {name for pattern in given.exclude for name in named if matches(pattern, name)}
    unused = [pattern for pattern in given.exclude if not any(matches(pattern, name) for name in named)]
    indices = {name: int(found[1]) if (found := LAYER_INDEX.search(name)) else None for name in named}
    absent = sorted({*(given.layers or ())} - {*indices.values()})
    kept = [name for name in named if name not in left_out and (given.layers is None or indices[name] in given.layers)]
    problems = [
        f"lora.exclude: '{pattern}' is in {other}; remove it."
        if (other := other_part(model, pattern))
        else f"lora.exclude: '{pattern}' matches no layer of lora.targets; correct or remove it."
        for pattern in unused
    ]
    if absent:
        largest = max((index for index in indices.values() if index is not None), default=None)
        there = "has no numbered layers" if largest is None else f"has layers 0 to {largest}"
        problems.append(f"lora.layers: {type(model).__name__} {there}, not {', '.join(map(str, absent))}.")
    if not problems and not kept:
        problems.append("lora.targets, lora.exclude and lora.layers leave no layer to adapt.")
    if problems:
        raise ModelError("\n".join(problems))
    return kept


def _match_names(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    left_out = {*read_directly(model)} | routers(model)
    every = list(linear_layers(model))
    linears = [name for name in every if name not in left_out]
    if not linears:
        raise ModelError(f"{type(model).__name__} has no linear layer, so it can't be adapted.")
    head = next((name for name in linears if model.get_submodule(name) is output_head(model)), None)
    linears += expert_stacks(model)
    found = {}
    for pattern in [targets] if isinstance(targets, str) else targets:
        if pattern == ALL_LINEAR:
            found[pattern] = [name for name in linears if name != head]
        else:
            found[pattern] = [name for name in linears if matches(pattern, name)]
    problems = [_unmatched(model, every, linears, pattern) for pattern, names in found.items() if not names]
    if problems or not found:
        raise ModelError("\n".join(problems) or "lora.targets is empty, so there is nothing to train.")
    wanted = {name for names in found.values() for name in names}
    if head in wanted:
        raise ModelError(
            "lora.targets: the output head can't be adapted: one that scores documents is trained in full, and the "
            "loss of another is computed in chunks from a frozen weight, which it may share with the embeddings. Leave "
            "it out."
        )
    return [name for name in linears if name in wanted]


def _unmatched(model: nn.Module, every: Sequence[str], linears: Sequence[str], pattern: str) -> str:
    read = [name for name in every if matches(pattern, name)]
    if not read:
        return unmatched("lora.targets", pattern, model, linears, "adapted")
    if read[0] in routers(model):
        return f"lora.targets: '{pattern}' is {read[0]}, which chooses experts; routers stay as they are."
    return (
        f"lora.targets: '{pattern}' is {read[0]}, whose weight the model's code reads instead of calling the layer, so "
        "an adapter would have no effect there; leave it out."
    )


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    init: str = "kaiming",
    rslora: bool = False,
    dtype: torch.dtype | str = torch.bfloat16,
    form: str = "auto",
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    kind: str = "lora",
    train: str = "AB",
    exclude: Sequence[str] = (),
    layers: Collection[int] | None = None,
    expert_rank: int | str = AUTO,
) -> list[str]:
    """Freeze a model and wrap its linear layers in :class:`LoraLinear`, in place.

    Args:
        model: A causal language model, or any module with linear layers.
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Probability of dropping an input of the update.
        targets: See :class:`Targets`.
        init: Initial values of A: `kaiming`, `gaussian` or `orthogonal`. B is zero. The others are computed from
            weights or data, and need :func:`qlora.train`.
        rslora: Scale by alpha / sqrt(rank).
        dtype: Dtype of the factors.
        form: How products are computed: `separate`, `folded`, or `auto` for the faster one.
        seed: Seed of the initial values.
        rank_pattern: Ranks of some layers, by regular expressions that match the end of a layer's name from a dot on;
            the first that matches counts, as in PEFT. `{"down_proj": 32, r"layers\\.0\\..*": 8}`
        alpha_pattern: Alphas of some layers, in the same way.
        kind: `lora`, `dora` or `rows`, see :class:`AdapterSpec`.
        train: `AB`, or `B` alone.
        exclude: Layers of `targets` that are left out.
        layers: Indices of the decoder layers to adapt; default: all.
        expert_rank: Rank of the adapters of experts, see :func:`qlora.lora.experts.rank_of_experts`; 0 for none.

    Returns:
        The names of the adapted layers and stacks of experts.

    Raises:
        ModelError: A value is out of range or unknown, a target or pattern matches nothing, or the model has adapters
            already.
    """
    spec = AdapterSpec(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        kind=kind,
        train=train,
        init=init,
        rslora=rslora,
        dtype=dtype,
        form=form,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
    )
    if init in COMPUTED_INITS:
        raise ModelError(f"init: {init!r} is computed from weights or data: set lora.init of a run, and train it.")
    chosen = Targets(targets, exclude, layers)
    experts = specs_of_experts(model, spec, chosen, expert_rank)
    specs = spec.by_layer(match_targets(model, chosen), others=experts)
    check_ranks(model, specs)
    wrap_linears(model, specs, seed)
    wrap_experts(model, experts)
    reset_experts(model, seed)
    return [*specs, *experts]


def specs_of_experts(
    model: nn.Module,
    spec: AdapterSpec,
    targets: Targets,
    rank: int | str = AUTO,
    given: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, AdapterSpec]:
    """Return the specs of the stacks of experts that are adapted, by their names.

    Args:
        model: A model.
        spec: Spec of the other layers.
        targets: The layers to adapt.
        rank: See :func:`qlora.lora.experts.rank_of_experts`.
        given: Ranks of stacks that start from factors, by their names.

    Raises:
        ModelError: See :func:`match_targets`; the rank is out of range, or given for a model without experts; or the
            adapter is of a kind that experts can't have.
    """
    check_rank(rank, model)
    names = match_experts(model, targets) if rank else []
    return specs_with_rank(spec, names, rank_of_experts(rank, spec.rank, model), given) if names else {}


def check_ranks(model: nn.Module, specs: Mapping[str, AdapterSpec]) -> None:
    """Check that layers have as many rows, directions or singular values as their adapters are made of.

    Raises:
        ModelError: Some have fewer; names them.
    """
    problems = []
    for name, spec in specs.items():
        layer: Any = model.get_submodule(name)
        most = spec.largest_rank(layer.out_features, layer.in_features)
        if most is not None and spec.rank > most:
            what = "lora.kind: rows" if spec.kind == "rows" else f"lora.init: {spec.init}"
            problems.append(f"lora.rank: {name} has rank {spec.rank}, but {what} allows at most {most} there")
    if problems:
        rest = f"\n… and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ModelError("\n".join(problems[:4]) + rest + "\nLower lora.rank, or set lora.rank_pattern.")


def wrap_linears(model: nn.Module, specs: Mapping[str, AdapterSpec], seed: int = 0) -> None:
    """Freeze a model and wrap linear layers in adapters with initial values, in place; see :func:`add_lora`.

    Args:
        model: A model without adapters.
        specs: Specs by the names of the layers.
        seed: Seed of the initial values.

    Raises:
        ModelError: The model has adapters already.
    """
    wrap_layers(model, specs)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        layer.reset(generator, getattr(model, "dtype", None))


def wrap_layers(model: nn.Module, specs: Mapping[str, AdapterSpec]) -> None:
    """Freeze a model and wrap linear layers in adapters whose values are zero, in place.

    Args:
        model: A model without adapters.
        specs: Specs by the names of the layers.

    Raises:
        ModelError: The model has adapters already.
    """
    if any(lora_layers(model)) or any(lora_experts(model)):
        raise ModelError("This model has adapters already; load the base again to add others.")
    model.requires_grad_(False)
    for name, spec in specs.items():
        base: Any = model.get_submodule(name)
        layer = LoraLinear(base, spec)
        layer.train(
            model.training
        )  # A new module is in training mode, and would apply dropout in a model loaded for inference.
        model.set_submodule(name, layer)
