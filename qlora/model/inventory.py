"""What a loaded model is made of: which parameters are quantized, adapted, or neither, and their bytes."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qlora.lora import LoraLinear
from qlora.nf4 import NF4Linear


@dataclass(frozen=True, slots=True)
class Inventory:
    """Shares of a model's parameters.

    Attributes:
        num_parameters: Of the base, each counted once.
        num_trained: Elements of the adapters.
        quantized_share: Of the base's parameters, those in 4 bits.
        adapted_share: Of the base's parameters, those in layers with an adapter.
        base_bytes: Held by the base.
        quantized: Names of the quantized layers.
        unquantized: Names of all parameters that are not.
    """

    num_parameters: int
    num_trained: int
    quantized_share: float
    adapted_share: float
    base_bytes: int
    quantized: list[str]
    unquantized: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def take_inventory(model: nn.Module) -> Inventory:
    """Counts a model with or without adapters; names are those without."""
    trained = in_4bit = adapted = plain = num_bytes = 0
    quantized, unquantized = [], []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        name = name.removesuffix(".base")
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, LoraLinear):
            trained += sum(parameter.numel() for parameter in parameters.values())
            adapted += module.in_features * module.out_features
            continue
        if isinstance(module, NF4Linear):
            in_4bit += module.in_features * module.out_features
            num_bytes += module.num_bytes
            quantized.append(name)
            del parameters["weight"]
        for own_name, parameter in parameters.items():
            if parameter not in seen:
                seen.add(parameter)
                unquantized.append(f"{name}.{own_name}")
                plain += parameter.numel()
                num_bytes += parameter.nbytes
    total = max(1, in_4bit + plain)
    return Inventory(total, trained, in_4bit / total, adapted / total, num_bytes, quantized, unquantized)


def frozen_checksum(model: nn.Module) -> int:
    """A sum over the bytes of all frozen weights and their statistics: it differs if training wrote to them."""
    total = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    frozen += [module.quant_state.absmax for module in model.modules() if isinstance(module, NF4Linear)]
    for tensor in frozen:
        total += tensor.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64)
    return int(total)
