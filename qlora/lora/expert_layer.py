"""Layers of experts of a transformers model, computed here through its `ExpertsInterface`.

The function is registered with transformers under its own name, which :func:`use_expert_function` sets on a model. No
architecture's code is changed, and none has code of its own here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.kernels import experts_path
from qlora.lora.expert_products import ExpertProjection, expert_products
from qlora.lora.experts import LoraExperts, PlainExperts
from qlora.lora.mixture import expert_layers, expert_stacks, projections
from qlora.lora.spec import AdapterSpec

NAME = "qlora_experts"


def use_expert_function(model: Any) -> None:
    """Have transformers compute all experts of a model by :func:`compute_experts`.

    Raises:
        ModelError: Some would be computed by another function, or are split over devices.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if any(getattr(layer, "_is_expert_parallel", False) for _, layer in expert_layers(model)):
        raise ModelError(
            f"{type(model).__name__}: experts that are in 4 bits or adapted can't be split over devices; load the base "
            "without tensor parallelism."
        )
    ALL_EXPERTS_FUNCTIONS.register(NAME, compute_experts)
    model.set_experts_implementation(NAME)
    # transformers finds out by a model's source text whether it can, and otherwise changes nothing.
    others = [name for name, layer in expert_layers(model) if layer.config._experts_implementation != NAME]
    if others:
        raise ModelError(
            f"{type(model).__name__}: transformers computes {len(others)} layers of experts by a function of its own "
            f"({', '.join(others[:3])} …), so they can be neither in 4 bits nor adapted; set "
            "model.quantization: none and lora.expert_rank: 0."
        )


def describe_experts(model: Any) -> str | None:
    """Describe how the experts of a model are computed, and why; None if there are none, or transformers does it."""
    if all(layer.config._experts_implementation != NAME for _, layer in expert_layers(model)):
        return None
    return experts_path(model.device, model.dtype)


def compute_experts(
    layer: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute a layer of experts; transformers calls it with the layer first.

    Args:
        layer: A layer of experts, whose projections are modules that hold weights, such as `NF4Experts`, or
            :class:`LoraExperts`.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, top_k), the experts of each token.
        top_k_weights: (tokens, top_k), their scores.

    Returns:
        (tokens, hidden).
    """
    up, down = (_projection(layer, part) for part in projections(layer))
    gate: Callable[[torch.Tensor], torch.Tensor] = layer._apply_gate if layer.has_gate else layer.act_fn
    factors = [factor for part in projections(layer) for factor in _factors(getattr(layer, part))]
    return expert_products(hidden_states, top_k_index, top_k_weights, up, down, gate, factors)


def _projection(layer: Any, part: str) -> ExpertProjection:
    own = getattr(layer, part)
    bias = getattr(layer, f"{part}_bias") if getattr(layer, "has_bias", False) else None
    if isinstance(own, LoraExperts):
        return ExpertProjection(own.base, bias, layer.is_transposed, own.spec.scaling if own.factors else None)
    return ExpertProjection(own, bias, layer.is_transposed)


def _factors(own: Any) -> tuple[torch.Tensor, ...]:
    return own.factors if isinstance(own, LoraExperts) else ()


def wrap_experts(model: Any, specs: Mapping[str, AdapterSpec]) -> None:
    """Put adapters whose values are zero on stacks of experts, in place.

    Args:
        model: A frozen model, its experts in 4 bits or not.
        specs: Specs by the names of the stacks.

    Raises:
        ModelError: transformers would compute some of the experts by another function.
    """
    stacks = expert_stacks(model)
    for name in {stacks[name].layer for name in specs}:
        layer = model.get_submodule(name)
        for part in projections(layer):
            if isinstance(weight := getattr(layer, part), nn.Parameter):  # not in 4 bits
                delattr(layer, part)
                layer.add_module(part, PlainExperts(weight))
    for name, spec in specs.items():
        adapted = LoraExperts(model.get_submodule(name), spec, stacks[name].is_transposed)
        adapted.train(model.training)
        model.set_submodule(name, adapted)
    if specs:
        use_expert_function(model)
