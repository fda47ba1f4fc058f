"""Inventory of a loaded model's parameters, and a checksum of the frozen ones."""

import torch
from torch import nn

from qlora.checkpoint import Inventory
from qlora.layers.sharding import SplitBytes
from qlora.lora import (
    LoraExperts,
    LoraLinear,
    linear_layers,
    lora_layers,
    output_head,
    read_directly,
    trained_rows,
)
from qlora.lora.host_rows import host_rows
from qlora.model.shares import linear_weights
from qlora.nf4 import NF4Experts, NF4Linear


def take_inventory(model: nn.Module) -> Inventory:
    """Count the parameters of a model with or without adapters; names are those of the model without adapters."""
    in_4bit = adapted = num_bytes = 0
    quantized, unquantized, experts = [], [], dict[str, int]()
    with_rows = dict(trained_rows(model))
    all_rows = {*with_rows.values()}  # a single one if embedding and head share them
    trained = sum(parameter.numel() for rows in all_rows for parameter in rows.trained)
    # A weight whose rows are all trained is removed from the base, but counts as its parameter.
    plain = sum(rows.num_frozen * rows.weight.shape[1] for rows in all_rows if rows.is_whole)
    on_host = [piece for pieces in host_rows(model).values() for piece in pieces]  # so is one on the host
    plain += sum(piece.numel() for piece in on_host)
    num_bytes += sum(piece.nbytes for piece in on_host)
    seen = {parameter for rows in all_rows for parameter in rows.trained}
    for name, module in model.named_modules():
        if isinstance(module, SplitBytes):  # those of the packed weights
            continue
        name = name.removesuffix(".base")
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, LoraLinear):
            trained += sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
            adapted += module.in_features * module.out_features
            continue
        if isinstance(module, LoraExperts):
            trained += sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
            adapted += module.numel
            experts[name] = module.spec.rank
            continue
        if isinstance(module, NF4Linear | NF4Experts):
            in_4bit += module.numel
            num_bytes += module.num_bytes
            quantized.append(name)
            del parameters["weight"]
        for own_name, parameter in parameters.items():
            if parameter not in seen:
                seen.add(parameter)
                unquantized.append(f"{name}.{own_name}")
                plain += parameter.numel()
                num_bytes += parameter.nbytes
    linear = max(1, sum(numel for _, numel, _ in linear_weights(model)))
    return Inventory(
        num_parameters=max(1, in_4bit + plain),
        num_trained=trained,
        quantized_share=in_4bit / linear,
        adapted_share=adapted / linear,
        base_bytes=num_bytes,
        quantized=quantized,
        unquantized=unquantized,
        trained_rows={name: [rows.ids.start, rows.ids.stop] for name, rows in with_rows.items()},
        shared_rows=len(all_rows) < len(with_rows),
        adapted=[name for name, _ in lora_layers(model)],
        adapted_experts=experts,
        read_directly=_read_directly(model),
    )


def _read_directly(model: nn.Module) -> list[str]:
    linears, head = linear_layers(model), output_head(model)
    return [name for name in read_directly(model) if name in linears and linears[name] is not head]


def frozen_checksum(model: nn.Module) -> int:
    """Sum the bytes of all frozen weights and their statistics; the sum changes if training writes to them."""
    total = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, SplitBytes):  # those of the packed weights
            continue
        if isinstance(module, NF4Linear | NF4Experts):
            module.ensure_present()
        frozen: list[torch.Tensor] = [each for each in module.parameters(recurse=False) if not each.requires_grad]
        if isinstance(module, NF4Linear | NF4Experts):
            frozen += module.statistics
        if isinstance(module, LoraLinear):
            frozen += module.buffers(recurse=False)
        for tensor in frozen:
            total += tensor.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)
    on_host = [piece.view(torch.uint8) for pieces in host_rows(model).values() for piece in pieces]
    return int(total) + sum(int(piece.sum(dtype=torch.int64)) for piece in on_host)
