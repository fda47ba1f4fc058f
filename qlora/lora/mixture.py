"""The parts of a mixture of experts in a transformers model: layers of experts and their routers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qlora.errors import ModelError

# Names that transformers gives the fused parameters: experts with a gate hold it and the up projection in one.
GATED, UNGATED, DOWN = "gate_up_proj", "up_proj", "down_proj"
# Parts of the names of routers, besides those that contain `router`.
ROUTERS = ("gate", "wg")
# Names that configs give the number of experts of a token.
EXPERTS_OF_A_TOKEN = (
    "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token",
)  # fmt: skip
# A tensor of three dimensions with more than this share of all weights holds those of experts.
LEAST_EXPERTS = 0.01


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


def is_transposed(layer: Any, part: str) -> bool:
    """Return whether experts' weights are (in, out), as their layer says unless they are held the other way."""
    own = getattr(layer, part)
    return bool(layer.is_transposed) and not getattr(getattr(own, "base", own), "is_flipped", False)


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Return the weights of the experts of a model by their full names, in the model's order."""
    stacks = [
        ExpertStack(name, part, tuple(getattr(layer, part).shape), is_transposed(layer, part))
        for name, layer in expert_layers(model)
        for part in projections(layer)
    ]
    return {stack.name: stack for stack in stacks}


def undeclared_experts(model: nn.Module) -> list[str]:
    """Return the names of modules that hold experts' weights, but are no layers of experts as above.

    They are recognized by the name of their class, or by a large weight of three dimensions that is no convolution's.
    """
    least = LEAST_EXPERTS * sum(parameter.numel() for parameter in model.parameters())

    def holds_experts(module: nn.Module) -> bool:
        if is_expert_layer(module) or isinstance(module, nn.Linear | _ConvNd):
            return False
        is_named = "Expert" in type(module).__name__
        return any(
            (is_named and parameter.dim() > 1)
            or (parameter.dim() == 3 and len(parameter) > 1 and parameter.numel() > least)
            for parameter in module.parameters(recurse=False)
        )

    return [name for name, module in model.named_modules() if holds_experts(module)]


def routers(model: nn.Module) -> set[str]:
    """Return the names of the linear layers that choose experts: a score for each, in the block of a layer of experts.

    They are told by their names too, because where the block is a whole decoder layer, keys and values may have as many
    features as there are experts. Most routers are modules of another class, and are left alone anyway.
    """
    found = set()
    for name, layer in expert_layers(model):
        block = name.rpartition(".")[0]
        num_experts = getattr(layer, projections(layer)[0]).shape[0]
        found |= {
            f"{block}.{own}"
            for own, module in model.get_submodule(block).named_modules()
            if getattr(module, "out_features", None) == num_experts
            and any(part in ROUTERS or "router" in part for part in own.split("."))
        }
    return found


def experts_per_token(model: Any) -> int:
    """Return the number of experts that compute each token, by the model's config; the most of any layer.

    Raises:
        ModelError: The config does not say it.
    """
    config = model.config.get_text_config()
    number = next((number for key in EXPERTS_OF_A_TOKEN if (number := getattr(config, key, None))), None)
    if number is None:
        raise ModelError(
            f"lora.expert_rank: auto needs the number of experts of a token, which the config of "
            f"{type(model).__name__} does not have; set a number."
        )
    return max(number) if isinstance(number, list | tuple) else int(number)
