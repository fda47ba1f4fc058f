"""Adapters in PEFT's format, minimal enough for every tool that reads it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora.checkpoint.base_files import read_header
from qlora.errors import CheckpointError, ModelError
from qlora.lora import lora_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(model: nn.Module, folder: Path, base_name: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a folder.

    Only the keys that PEFT, vLLM and llama.cpp need are written: some refuse what they do not know. The scaling is
    written as alpha / rank, however training had it: llama.cpp reads no other, and does not say so.
    """
    layers = dict(lora_layers(model))
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": first.rank,
        "lora_alpha": first.scaling * first.rank if first.rslora else first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": False,
        "target_modules": _target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's config.

    Raises:
        CheckpointError: It is absent or broken.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no adapter: {CONFIG_FILE} is missing.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict) or not {"r", "lora_alpha"} <= set(config):
        raise CheckpointError(f"{path} names no r and lora_alpha, so the adapter's scale is unknown.")
    return config


def read_adapter_tensors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors by module name: A (rank, in) and B (out, rank).

    Raises:
        CheckpointError: The file is absent, damaged, or holds other tensors than pairs of factors.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no adapter: {WEIGHTS_FILE} is missing.")
    try:
        read_header(path)
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    tensors = load_file(path)
    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    wanted = {f"{PREFIX}{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    if wanted != set(tensors):
        raise CheckpointError(f"{path}: not pairs of LoRA factors: {sorted(wanted ^ set(tensors))[:4]}")
    return {
        name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"])
        for name in sorted(names)
    }


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Copies an adapter's factors into the layers of a model that has matching ones.

    Raises:
        CheckpointError: The adapter has other modules or shapes than the model; they are named.
    """
    factors, layers = read_adapter_tensors(folder), dict(lora_layers(model))
    if set(factors) != set(layers):
        apart = sorted(set(factors) ^ set(layers))
        raise CheckpointError(f"{folder}: adapter and model differ in {len(apart)} modules: {', '.join(apart[:4])} …")
    for name, (lora_A, lora_B) in factors.items():
        layer = layers[name]
        if lora_A.shape != layer.lora_A.shape or lora_B.shape != layer.lora_B.shape:
            raise CheckpointError(
                f"{folder}: {name} has factors {tuple(lora_A.shape)} and {tuple(lora_B.shape)}, "
                f"the model {tuple(layer.lora_A.shape)} and {tuple(layer.lora_B.shape)}."
            )
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)


def _target_modules(model: nn.Module, adapted: list[str]) -> list[str]:
    """Last parts of the adapted names where those say exactly which layers are meant, else full names."""
    parts = sorted({name.rpartition(".")[2] for name in adapted})
    linears = [name.removesuffix(".base") for name, module in model.named_modules() if hasattr(module, "in_features")]
    meant = {name for name in linears if name.rpartition(".")[2] in parts}
    return parts if meant == set(adapted) else sorted(adapted)
