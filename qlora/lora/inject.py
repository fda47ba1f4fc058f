"""Selects the linear layers of a model that get an adapter, and wraps them."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.lora.linear import LoraLinear
from qlora.lora.spec import AdapterSpec

ALL_LINEAR = "all-linear"


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the adapted layers of a model with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if _is_linear(module)}


def match_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Return the names of the linear layers that `targets` asks for, in the model's order.

    Args:
        model: A model whose linear layers are `nn.Linear` or any module with `dequantize`.
        targets: `all-linear` (every linear but the output head), or one or more full names, last parts of
            names (`q_proj`), or regular expressions that match a full name.

    Raises:
        ModelError: The model has no linear layer, a target matches none (all such targets at once), or the head.
    """
    linears = list(linear_layers(model))
    if not linears:
        raise ModelError(f"{type(model).__name__} has no linear layer, so it can't be adapted.")
    head = _output_head(model)
    matches = {}
    for pattern in [targets] if isinstance(targets, str) else targets:
        if pattern == ALL_LINEAR:
            matches[pattern] = [name for name in linears if model.get_submodule(name) is not head]
        else:
            matches[pattern] = [name for name in linears if _matches(pattern, name)]
    problems = [_unmatched(model, linears, pattern) for pattern, names in matches.items() if not names]
    if problems or not matches:
        raise ModelError("\n".join(problems) or "lora.targets is empty, so there is nothing to train.")
    wanted = {name for names in matches.values() for name in names}
    if any(model.get_submodule(name) is head for name in wanted):
        raise ModelError(
            "lora.targets: the output head can't be adapted: its loss is computed in chunks from a frozen weight, and "
            "a merge can't store its update if it shares that weight with the embeddings. Leave it out."
        )
    return [name for name in linears if name in wanted]


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
) -> list[str]:
    """Freeze a model and wrap its linear layers in :class:`LoraLinear`, in place.

    Args:
        model: A causal language model, or any module with linear layers.
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Probability of dropping an input of the low-rank branch.
        targets: See :func:`match_targets`.
        init: Initial values of A: `kaiming` or `gaussian`. B is zero.
        rslora: Scale by alpha / sqrt(rank).
        dtype: Dtype of the factors.
        form: How products are computed: `separate`, `folded`, or `auto` for the faster one.
        seed: Seed of the initial values.
        rank_pattern: Ranks of some layers, by regular expressions that match the end of a layer's name from a dot on;
            the first that matches counts, as in PEFT. `{"down_proj": 32, r"layers\\.0\\..*": 8}`
        alpha_pattern: Alphas of some layers, in the same way.

    Returns:
        The names of the adapted layers.

    Raises:
        ModelError: A value is out of range or unknown, a target or pattern matches nothing, or the model has adapters
            already.
    """
    spec = AdapterSpec(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        init=init,
        rslora=rslora,
        dtype=dtype,
        form=form,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
    )
    return wrap_linears(model, spec, targets, seed)


def wrap_linears(
    model: nn.Module, spec: AdapterSpec, targets: str | Sequence[str] = ALL_LINEAR, seed: int = 0
) -> list[str]:
    """Freeze a model and wrap its linear layers in adapters of a spec, in place; see :func:`add_lora`."""
    specs = spec.by_layer(match_targets(model, targets))
    wrap_layers(model, specs)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        layer.reset(generator)
    return list(specs)


def wrap_layers(model: nn.Module, specs: Mapping[str, AdapterSpec]) -> None:
    """Freeze a model and wrap linear layers in adapters whose factors are zero, in place.

    Args:
        model: A model without adapters.
        specs: Specs by the names of the layers.

    Raises:
        ModelError: The model has adapters already.
    """
    if any(lora_layers(model)):
        raise ModelError("This model has adapters already; load the base again to add others.")
    model.requires_grad_(False)
    for name, spec in specs.items():
        layer = LoraLinear(model.get_submodule(name), spec)
        layer.train(
            model.training
        )  # A new module is in training mode, and would apply dropout in a model loaded for inference.
        model.set_submodule(name, layer)


def _is_linear(module: nn.Module) -> bool:
    # A transformers model has `dequantize` too, but no sizes.
    return isinstance(module, nn.Linear) or (hasattr(module, "dequantize") and hasattr(module, "in_features"))


def _output_head(model: nn.Module) -> nn.Module | None:
    head = getattr(model, "get_output_embeddings", None)
    return head() if head else None


def _matches(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _unmatched(model: nn.Module, linears: Sequence[str], pattern: str) -> str:
    others = [name for name, _ in model.named_modules() if name and _matches(pattern, name)]
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        return f"lora.targets: '{pattern}' is {others[0]}, a {kind}; only linear layers can be adapted."
    parts = sorted({name.rpartition(".")[2] for name in linears})
    near = difflib.get_close_matches(pattern, [*parts, *linears], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"lora.targets: '{pattern}' matches no linear layer.{hint} This model has: {', '.join(parts)}."
