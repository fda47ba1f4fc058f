"""Adapters in PEFT's format, minimal enough for every tool that reads it."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora.checkpoint.adapter_rows import (
    PREFIX,
    StoredRows,
    check_rows_config,
    load_rows,
    read_rows,
    rows_config,
    rows_tensors,
)
from qlora.errors import CheckpointError, ModelError
from qlora.files.base_files import describe_pickles
from qlora.files.headers import read_header
from qlora.files.json_files import read_object
from qlora.lora import lora_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# More than any layer is wide.
MAX_RANK = 1 << 20
LARGEST_ALPHA = 1e30
# First values that change the base's weights: the adapter is for a base that is not the published one.
CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "eva")
FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's `adapter_model.safetensors`, which identifies what was trained.

    Raises:
        CheckpointError: The file is missing or can't be read.
    """
    path = _weights_file(folder)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}.") from None


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no adapter: {WEIGHTS_FILE} is missing{describe_pickles(folder)}.")
    return path


def save_adapter(model: nn.Module, folder: Path, base_name: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a folder.

    Only the keys that PEFT, vLLM and llama.cpp need are written: some refuse what they do not know. The scaling is
    written as alpha / rank, however training had it: llama.cpp reads no other, and does not say so.
    """
    layers = dict(lora_layers(model))
    spec = next(iter(layers.values())).spec
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": spec.rank,
        "lora_alpha": spec.scaling * spec.rank if spec.rslora else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": False,
        "target_modules": _target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    } | rows_config(model)
    tensors = rows_tensors(model)
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's config.

    Raises:
        CheckpointError: It is absent, broken, or tells no scale.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no adapter: {CONFIG_FILE} is missing.")
    config = read_object(path, CheckpointError, "save or download it again")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    is_scale = isinstance(alpha, int | float) and abs(alpha) < LARGEST_ALPHA
    if type(rank) is not int or not 0 < rank <= MAX_RANK or not is_scale:
        raise CheckpointError(f"{path} names no r and lora_alpha, so the adapter's scale is unknown.")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(
            _is_pattern(pattern) and type(value) in (int, float) and 0 < value < LARGEST_ALPHA
            for pattern, value in patterns.items()
        ):
            raise CheckpointError(f"{path}: {key} holds no regular expressions with a number above 0 each.")
    targets = config.get("target_modules") or []
    if not isinstance(targets, list) and not (isinstance(targets, str) and _is_pattern(targets)):
        raise CheckpointError(f"{path}: target_modules is no list of names and no regular expression.")
    check_rows_config(config, path)
    return config


def adapter_scaling(folder: Path) -> float:
    """The factor on B A that an adapter's config stands for, in all layers.

    Raises:
        CheckpointError: It stands for another in some, or is for a base of its own.
    """
    config = read_adapter_config(folder)
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if patterns or str(config.get("init_lora_weights")).startswith(CHANGING_INITS):
        what = f"a {patterns[0]}" if patterns else f"init_lora_weights: {config['init_lora_weights']}"
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has {what}: read is plain LoRA alone, of one rank and one alpha on the published "
            "base, as runs leave it. Use an adapter from elsewhere with the tool that made it."
        )
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def read_adapter_header(folder: Path) -> dict[str, Any]:
    """Dtype, shape and place of an adapter's tensors, by name.

    Raises:
        CheckpointError: The file is absent or damaged, or factors in it are no matrices.
    """
    path = _weights_file(folder)
    try:
        header = read_header(path)
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    for name, entry in header.items():
        is_factor = name.endswith((".lora_A.weight", ".lora_B.weight"))
        if is_factor and (len(entry["shape"]) != 2 or entry["dtype"] not in FACTOR_DTYPES):
            raise CheckpointError(f"{path}: {name} is no LoRA factor: {entry['dtype']} {entry['shape']}.")
    return header


def read_adapter_tensors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors by module name: A (rank, in) and B (out, rank).

    Raises:
        CheckpointError: The file is absent, damaged, or holds other tensors than pairs of factors and trained rows.
    """
    path, header = folder / WEIGHTS_FILE, read_adapter_header(folder)
    for name, rows in read_adapter_rows(folder).items():
        header.pop(rows.tensor)
        header.pop(f"{PREFIX}{name}.bias", None)
    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in header}
    wanted = {f"{PREFIX}{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    if wanted != set(header):
        raise CheckpointError(f"{path}: not pairs of LoRA factors: {sorted(wanted ^ set(header))[:4]}")
    pairs = {name: [f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB"] for name in sorted(names)}
    for name, (key_A, key_B) in pairs.items():
        if header[key_A]["shape"][0] != header[key_B]["shape"][1]:
            raise CheckpointError(f"{path}: {name} has factors {header[key_A]['shape']} and {header[key_B]['shape']}.")
    tensors = load_file(path)
    return {name: (tensors[key_A], tensors[key_B]) for name, (key_A, key_B) in pairs.items()}


def read_adapter_rows(folder: Path) -> dict[str, StoredRows]:
    """Where the file has rows that were trained in full, by module name.

    Raises:
        CheckpointError: The adapter is absent or damaged, or config and file differ in them.
    """
    return read_rows(read_adapter_config(folder), read_adapter_header(folder))


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Copies an adapter's factors and trained rows into the layers of a model that has matching ones.

    Raises:
        CheckpointError: The adapter has other modules, shapes, rows or another scaling than the model; they are named.
    """
    scaling = adapter_scaling(folder)
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
        if not math.isclose(scaling, layer.spec.scaling):
            raise CheckpointError(
                f"{folder} has a scaling of {scaling:g}, the run trained with {layer.spec.scaling:g}."
            )
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    load_rows(model, read_adapter_rows(folder), load_file(folder / WEIGHTS_FILE))


def _is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except (re.error, RecursionError, OverflowError):
        return False


def _target_modules(model: nn.Module, adapted: list[str]) -> list[str]:
    """Last parts of the adapted names where those say exactly which layers are meant, else full names."""
    parts = sorted({name.rpartition(".")[2] for name in adapted})
    linears = [name.removesuffix(".base") for name, module in model.named_modules() if hasattr(module, "in_features")]
    meant = {name for name in linears if name.rpartition(".")[2] in parts}
    return parts if meant == set(adapted) else sorted(adapted)
