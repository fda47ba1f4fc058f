"""The parameters of a loaded model: which are quantized, adapted, or neither, and their bytes."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qlora.lora import LoraLinear, trained_rows
from qlora.nf4 import NF4Linear


@dataclass(frozen=True, slots=True)
class Inventory:
    """Shares of a model's parameters.

    Attributes:
        num_parameters: Number of the base's parameters, each counted once.
        num_trained: Number of trained values: the adapters', and those of rows trained in full.
        quantized_share: Share of the base's parameters in 4 bits.
        adapted_share: Share of the base's parameters in layers with an adapter.
        base_bytes: Bytes of the base's weights; an embedding or head whose rows are all trained is not included.
        quantized: Names of the quantized layers.
        unquantized: Names of all parameters that are not quantized.
        trained_rows: Range of the rows trained in full, [first, last + 1], by the module's name.
        shared_rows: Whether embedding and head are tied, and share their trained rows.
    """

    num_parameters: int
    num_trained: int
    quantized_share: float
    adapted_share: float
    base_bytes: int
    quantized: list[str]
    unquantized: list[str]
    trained_rows: dict[str, list[int]]
    shared_rows: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the inventory for run.json."""
        return asdict(self)

    def describe_rows(self) -> str:
        """Describe the rows that are trained in addition to the adapters; empty if there are none."""
        if not self.trained_rows:
            return ""
        rows = [f"{stop - start} rows of {name}" for name, (start, stop) in self.trained_rows.items()]
        return f" ({', '.join(rows)} among them{', which share their weight' if self.shared_rows else ''})"


def take_inventory(model: nn.Module) -> Inventory:
    """Count a model's parameters, with or without adapters; names are those without."""
    in_4bit = adapted = num_bytes = 0
    quantized, unquantized = [], []
    with_rows = dict(trained_rows(model))
    all_rows = {*with_rows.values()}  # a single one if embedding and head share them
    trained = sum(rows.weight.numel() for rows in all_rows)
    # A weight whose rows are all trained was removed from the base, but counts as its parameter.
    plain = sum(rows.num_frozen * rows.weight.shape[1] for rows in all_rows if rows.is_whole)
    seen = {rows.weight for rows in all_rows}
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
    return Inventory(
        num_parameters=total,
        num_trained=trained,
        quantized_share=in_4bit / total,
        adapted_share=adapted / total,
        base_bytes=num_bytes,
        quantized=quantized,
        unquantized=unquantized,
        trained_rows={name: [rows.ids.start, rows.ids.stop] for name, rows in with_rows.items()},
        shared_rows=len(all_rows) < len(with_rows),
    )


def frozen_checksum(model: nn.Module) -> int:
    """Sum the bytes of all frozen weights and their statistics; the sum changes if training writes to them."""
    total = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    frozen += [module.quant_state.absmax for module in model.modules() if isinstance(module, NF4Linear)]
    for tensor in frozen:
        total += tensor.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64)
    return int(total)
