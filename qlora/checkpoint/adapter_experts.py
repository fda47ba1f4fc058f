"""Adapters of experts, as PEFT stores them in an adapter: LoRA on parameters that are not linear layers.

PEFT lists such parameters in `target_parameters` and puts a wrapper around their module for each. The first parameter
of a module has the innermost wrapper, whose factors are named `….base_layer.lora_A.weight`, and the last one the
outermost, `….lora_A.weight`. The factors of all experts are one matrix each: A is (experts · rank, in), expert by
expert, and B is (out, rank · experts), in which the expert runs fastest.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qlora.checkpoint.adapter_rows import PREFIX
from qlora.lora import LoraExperts, StoredExperts, lora_experts
from qlora.lora.mixture import DOWN, GATED, UNGATED, expert_layers, expert_stacks

KEY = "target_parameters"
INNER = ".base_layer"
# In the order in which PEFT wraps them.
PARTS = (GATED, UNGATED, DOWN)
# Last parts of names that PEFT takes for experts of transformers 4 in mixtures of some families, so that adapters of
# linear layers with these names would be lost; as parameters they are found.
TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
FACTOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<factor>[AB])\.weight")


def linear_parameters(model: nn.Module, adapted: Iterable[str]) -> list[str]:
    """Return the adapted linear layers of a model that PEFT has to find as parameters; empty without experts."""
    if not any(expert_layers(model)):
        return []
    return [name for name in adapted if name.rpartition(".")[2] in TAKEN_FOR_EXPERTS]


def end_of_stack(name: str) -> str | None:
    """Return the last two parts of a stack's name, such as `experts.down_proj`; None for what is no stack."""
    *_, module, part = ["", "", *name.split(".")]
    return f"{module}.{part}" if part in PARTS and "expert" in module else None


def experts_targets(model: nn.Module) -> list[str]:
    """Return the adapted stacks of a model for PEFT's config: by the ends of their names if these select no others."""
    adapted = {name for name, _ in lora_experts(model)}
    ends = sorted({".".join(name.split(".")[-2:]) for name in adapted})
    return ends if {name for name in expert_stacks(model) if _is_asked(name, ends)} == adapted else sorted(adapted)


def experts_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the factors of a model's adapted experts by PEFT's names."""
    tensors = {}
    wrappers = _wrappers([name for name, _ in lora_experts(model)])
    for name, layer in lora_experts(model):
        stored = layer.stored()
        A, B = (factor.cpu() for factor in (stored.A, stored.B))
        tensors[f"{wrappers[name]}.lora_A.weight"] = A.reshape(-1, A.shape[2]).contiguous()
        tensors[f"{wrappers[name]}.lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()
    return tensors


def read_experts(config: Mapping[str, Any], header: Mapping[str, Any]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Find the factors of each adapted stack of experts in an adapter's file.

    Args:
        config: Config of the adapter.
        header: Header of the adapter's tensors file.

    Returns:
        The names of A and B by the name of the stack, and a line for each mismatch of config and file.
    """
    asked = [name for name in config.get(KEY) or [] if name.rpartition(".")[2] in PARTS]
    if not asked:
        return {}, []
    modules = {match["module"] for key in header if (match := FACTOR.fullmatch(key))}
    stacks = [
        f"{module}.{part}"
        for module in sorted(modules)
        if not _is_linear(config, module)  # which a parameter's name alone, such as gate_up_proj, would select too
        for part in PARTS
        if _is_asked(f"{module}.{part}", asked)
    ]
    found = {
        name: (f"{wrapper}.lora_A.weight", f"{wrapper}.lora_B.weight") for name, wrapper in _wrappers(stacks).items()
    }
    problems = [
        f"{KEY} names {name}, but the file has no factors of it"
        for name, keys in found.items()
        if any(key not in header for key in keys)
    ]
    problems += [
        f"{KEY} names {name}, but the file has no factors of it"
        for name in asked
        if not any(_is_asked(stack, [name]) for stack in stacks)
    ]
    return found, problems


def is_linear_parameter(config: Mapping[str, Any], module: str) -> bool:
    """Return whether an adapter's config lists a linear layer by its weight, rather than as a module."""
    return _is_asked(f"{module}.weight", config.get(KEY) or [])


def _is_linear(config: Mapping[str, Any], module: str) -> bool:
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, module))
    return _is_asked(module, targets) or is_linear_parameter(config, module)


def stored_experts(A: torch.Tensor, B: torch.Tensor, rank: int, scaling: float) -> StoredExperts:
    """Return the factors of each expert, given those of all in PEFT's layout."""
    return StoredExperts(
        A.reshape(-1, rank, A.shape[1]), B.reshape(len(B), rank, -1).permute(2, 0, 1).contiguous(), scaling
    )


def experts_problems(model: nn.Module, experts: Mapping[str, StoredExperts]) -> list[str]:
    """Return a line for each stack of an adapter that a base can't take."""
    stacks, problems = expert_stacks(model), []
    for name, stored in experts.items():
        stack = stacks.get(name)
        given = len(stored.A), stored.B.shape[1], stored.A.shape[2]
        if stack is None:
            problems.append(f"the base has no experts {name} that transformers' ExpertsInterface computes")
        elif given != (stack.shape[0], *stack.sizes):
            problems.append(f"{name} has factors for {given}, the base's experts are {(stack.shape[0], *stack.sizes)}")
    return problems


@torch.no_grad()
def copy_experts(layer: LoraExperts, stored: StoredExperts) -> None:
    """Copy stored factors into a layer of the same shapes."""
    layer.lora_A.copy_(stored.A)
    layer.lora_B.copy_(stored.B)


def _is_asked(name: str, asked: Iterable[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in asked)


def _wrappers(names: Iterable[str]) -> dict[str, str]:
    """Return the name of PEFT's wrapper for each stack; those of a module are nested, the first innermost."""
    by_module: dict[str, list[str]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        by_module.setdefault(module, []).append(part)
    return {
        f"{module}.{part}": f"{PREFIX}{module}{INNER * (len(parts) - 1 - place)}"
        for module, parts in by_module.items()
        for place, part in enumerate(sorted(parts, key=PARTS.index))
    }
