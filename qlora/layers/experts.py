"""Experts in 4 bits, computed through transformers' `ExpertsInterface`, without a change to any architecture's code.

The function is registered with transformers under its own name, which :func:`use_nf4_experts` sets on a model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qlora.errors import ModelError
from qlora.lora.expert_products import ExpertProjection, expert_products
from qlora.lora.mixture import expert_layers, expert_stacks, projections, undeclared_experts
from qlora.nf4 import NF4Experts

NAME = "qlora_experts"


def use_nf4_experts(model: Any, quantized: Mapping[str, NF4Experts], double_quant: bool = True) -> list[str]:
    """Replace the experts of a model by ones in 4 bits, in place.

    Args:
        model: A model of transformers. Call :func:`check_experts` on its skeleton first.
        quantized: Experts that were quantized while they were loaded, by the full names of their parameters; the others
            are quantized now.
        double_quant: Quantize the blocks' statistics too.

    Returns:
        The names of the parameters that are now in 4 bits.

    Raises:
        ModelError: transformers would compute some of the experts by another function.
    """
    stacks = expert_stacks(model)
    for name, stack in stacks.items():
        layer = model.get_submodule(stack.layer)
        own = quantized.get(name)
        weights = NF4Experts.from_weight(getattr(layer, stack.part).data, double_quant) if own is None else own
        delattr(layer, stack.part)
        layer.add_module(stack.part, weights)
    if stacks:
        use_expert_function(model)
    return list(stacks)


def use_expert_function(model: Any) -> None:
    """Have transformers compute all experts of a model by :func:`compute_experts`.

    Raises:
        ModelError: Some would be computed by another function.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, compute_experts)
    model.set_experts_implementation(NAME)
    # transformers finds out by a model's source text whether it can, and otherwise changes nothing.
    others = [name for name, layer in expert_layers(model) if layer.config._experts_implementation != NAME]
    if others:
        raise ModelError(
            f"{type(model).__name__}: transformers computes {len(others)} layers of experts by a function of its own "
            f"({', '.join(others[:3])} …), so they can't be in 4 bits; set model.quantization: none."
        )


def check_experts(model: Any, name: str) -> None:
    """Check that all experts of a model can be in 4 bits.

    Args:
        model: A model of transformers, or its skeleton.
        name: Name of the base, for the message.

    Raises:
        ModelError: Some can't.
    """
    remedy = "set model.quantization: none (--quantization none), or use another base"
    undeclared = undeclared_experts(model)
    if undeclared:
        kind = type(model.get_submodule(undeclared[0])).__name__
        raise ModelError(
            f"{name}: {type(model).__name__} holds experts in {kind} ({undeclared[0]}), which is not computed by "
            f"transformers' ExpertsInterface, so they can't be in 4 bits; {remedy}."
        )
    for layer_name, layer in expert_layers(model):
        if getattr(layer, "has_post_expert_norm", False):
            raise ModelError(
                f"{name}: {type(layer).__name__} ({layer_name}) normalizes the output of each expert, which is not "
                f"supported for experts in 4 bits; {remedy}."
            )


def compute_experts(
    layer: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute a layer of experts; transformers calls it with the layer first.

    Args:
        layer: A layer of experts whose projections are in 4 bits.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, top_k), the experts of each token.
        top_k_weights: (tokens, top_k), their scores.

    Returns:
        (tokens, hidden).
    """
    if getattr(layer, "_is_expert_parallel", False):
        raise NotImplementedError("experts in 4 bits can't be split over devices")
    up, down = (_projection(layer, part) for part in projections(layer))
    gate: Callable[[torch.Tensor], torch.Tensor] = layer._apply_gate if layer.has_gate else layer.act_fn
    return expert_products(hidden_states, top_k_index, top_k_weights, up, down, gate)


def _projection(layer: Any, part: str) -> ExpertProjection:
    bias = getattr(layer, f"{part}_bias") if getattr(layer, "has_bias", False) else None
    return ExpertProjection(getattr(layer, part), bias, layer.is_transposed)
