"""Experts in 4 bits in place of those of a transformers model."""

from collections.abc import Mapping
from typing import Any

from qlora.errors import ModelError
from qlora.lora.expert_layer import use_expert_function
from qlora.lora.mixture import expert_stacks, undeclared_experts
from qlora.nf4 import NF4Experts


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
    take_over_experts(model, quantized)
    stacks = expert_stacks(model)
    for stack in stacks.values():
        layer = model.get_submodule(stack.layer)
        if not isinstance(getattr(layer, stack.part), NF4Experts):
            _replace(layer, stack.part, NF4Experts.from_weight(getattr(layer, stack.part).data, double_quant))
    if stacks:
        use_expert_function(model)
    return list(stacks)


def take_over_experts(model: Any, quantized: Mapping[str, NF4Experts], inside: str = "") -> None:
    """Replace the experts that were quantized while they were loaded, as far as they were not replaced before.

    Args:
        model: A model of transformers, which it may still be loading.
        quantized: The quantized experts by the full names of their parameters.
        inside: Name of the module whose experts are replaced; all by default.
    """
    for name, weights in quantized.items():
        owner, _, part = name.rpartition(".")
        layer = model.get_submodule(owner)
        if f"{owner}.".startswith(f"{inside}." if inside else "") and getattr(layer, part) is not weights:
            _replace(layer, part, weights)
            layer._is_hf_initialized = True  # or transformers would draw what it finds no parameter for


def _replace(layer: Any, part: str, weights: NF4Experts) -> None:
    delattr(layer, part)
    layer.add_module(part, weights)


def check_experts(model: Any, name: str) -> None:
    """Check that all experts of a model can be in 4 bits.

    Args:
        model: A model of transformers, or its skeleton.
        name: Name of the base, for the message.

    Raises:
        ModelError: Some can't.
    """
    undeclared = undeclared_experts(model)
    if undeclared:
        kind = type(model.get_submodule(undeclared[0])).__name__
        raise ModelError(
            f"{name}: {type(model).__name__} holds experts in {kind} ({undeclared[0]}), which transformers' "
            "ExpertsInterface does not compute, or computes with a norm of each output, so they can't be in 4 bits; "
            "use another base, or set model.allow_unquantized: true to train with these in 16 bits."
        )
