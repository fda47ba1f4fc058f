"""The parts of a mixture of experts in a transformers model: layers of experts and their routers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from qlora.errors import ModelError

# Names that transformers gives the fused parameters: experts with a gate hold it and the up projection in one.
GATED, UNGATED, DOWN = "gate_up_proj", "up_proj", "down_proj"


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """The weights of all experts of a layer for one projection.

    Attributes:
        layer: Name of the layer of experts.
        part: Name of the parameter in it.
        shape: (experts, rows, columns).
        is_transposed: Whether an expert's weight is (in, out).
    """

    layer: str
    part: str
    shape: tuple[int, int, int]
    is_transposed: bool

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.layer}.{self.part}"

    @property
    def numel(self) -> int:
        """Number of weights of all experts."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in) of an expert's weight."""
        rows, columns = self.shape[1:]
        return (columns, rows) if self.is_transposed else (rows, columns)


def expert_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers of experts that transformers' `ExpertsInterface` computes, with their names."""
    for name, module in model.named_modules():
        if is_expert_layer(module):
            yield name, module


def is_expert_layer(module: nn.Module) -> bool:
    """Return whether a module declares itself to transformers' `ExpertsInterface`, without a norm of each output."""
    is_declared = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    return is_declared and hasattr(type(module), "_apply_gate") and not getattr(module, "has_post_expert_norm", False)


def projections(layer: Any) -> tuple[str, str]:
    """Return the names of the parameters of a layer of experts: of the first product and of the second."""
    return (GATED if layer.has_gate else UNGATED), DOWN


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Return the weights of the experts of a model by their full names, in the model's order."""
    stacks = [
        ExpertStack(name, part, tuple(getattr(layer, part).shape), bool(layer.is_transposed))
        for name, layer in expert_layers(model)
        for part in projections(layer)
    ]
    return {stack.name: stack for stack in stacks}


def undeclared_experts(model: nn.Module) -> list[str]:
    """Return the names of modules that hold experts' weights, but are no layers of experts as above."""
    return [
        name
        for name, module in model.named_modules()
        if "Expert" in type(module).__name__
        and not is_expert_layer(module)
        and not isinstance(module, nn.Linear)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]


def routers(model: nn.Module) -> set[str]:
    """Return the names of the linear layers that choose experts: those beside a layer of experts with a score for each.

    Most routers are modules of another class, and are left alone anyway.
    """
    found = set()
    for name, layer in expert_layers(model):
        block = name.rpartition(".")[0]
        num_experts = getattr(layer, projections(layer)[0]).shape[0]
        found |= {
            f"{block}.{own}"
            for own, module in model.get_submodule(block).named_modules()
            if not own.startswith(name.rpartition(".")[2])
            and getattr(module, "out_features", None) == num_experts
            and own.rpartition(".")[2] not in ("up_proj", "gate_proj", "down_proj")
        }
    return found


def experts_per_token(model: Any) -> int:
    """Return the number of experts that compute each token, by the model's config; the most of any layer.

    Raises:
        ModelError: The config does not say it.
    """
    number = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if not number:
        raise ModelError(
            f"lora.expert_rank: auto needs the number of experts of a token, which the config of "
            f"{type(model).__name__} does not have; set a number."
        )
    return max(number) if isinstance(number, list | tuple) else int(number)
