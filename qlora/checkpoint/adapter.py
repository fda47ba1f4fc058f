"""Adapters in PEFT's format, with only the keys that all tools read."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
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
from qlora.lora.spec import by_pattern, is_pattern_map, is_regex, matches, scaling

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Above the width of any layer.
MAX_RANK = 1 << 20
LARGEST_ALPHA = 1e30
# Values of init_lora_weights that change the base's weights, so that the adapter does not fit the published base.
CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")
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
        raise CheckpointError(f"{folder} has no adapter: {WEIGHTS_FILE} is missing{describe_pickles(folder)}.")
    return path


def save_adapter(model: nn.Module, folder: str | Path, base_name: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into a folder.

    Only the keys that PEFT, vLLM and llama.cpp need are written, because some tools refuse unknown keys. The scaling is
    written as alpha / rank even with rsLoRA, because llama.cpp silently ignores other scalings. Layers whose rank or
    alpha is not the most common one are listed by name in `rank_pattern` and `alpha_pattern`.

    Args:
        model: Model with adapters.
        folder: Folder, which is created if it is absent.
        base_name: Folder or hub id of the base, for the adapter's config.

    Raises:
        CheckpointError: The model has no adapters.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise CheckpointError(f"{type(model).__name__} has no adapters to save; add some with add_lora.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: layer.spec for name, layer in layers.items()}
    ranks = {name: spec.rank for name, spec in specs.items()}
    alphas = {name: spec.scaling * spec.rank if spec.rslora else spec.alpha for name, spec in specs.items()}
    (rank, rank_pattern), (alpha, alpha_pattern) = _as_patterns(ranks), _as_patterns(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(specs.values())).dropout,
        "use_rslora": False,
        "target_modules": _target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    config |= {key: pattern for key, pattern in patterns.items() if pattern} | rows_config(model)
    tensors = rows_tensors(model)
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _as_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common of values by layer, and the others by patterns that each match a single layer."""
    common = Counter(values.values()).most_common(1)[0][0]
    others = {}
    for name, value in values.items():
        if value != common:
            is_unique = not any(matches(name, other) for other in values if other != name)
            others[name if is_unique else f"^{re.escape(name)}"] = value
    return common, others


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's config.

    Raises:
        CheckpointError: It is missing, damaged, or does not determine the scaling.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no adapter: {CONFIG_FILE} is missing.")
    config = read_object(path, CheckpointError, "save or download it again")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    is_scale = isinstance(alpha, int | float) and abs(alpha) < LARGEST_ALPHA
    if type(rank) is not int or not 0 < rank <= MAX_RANK or not is_scale:
        raise CheckpointError(
            f"{path} has no valid r and lora_alpha, so the adapter's scaling is unknown; save or download it again."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not is_pattern_map(patterns) or not all(
            type(value) in (int, float) and 0 < value < LARGEST_ALPHA for value in patterns.values()
        ):
            raise CheckpointError(f"{path}: {key} should map regular expressions to numbers above 0.")
    targets = config.get("target_modules") or []
    if not isinstance(targets, list) and not (isinstance(targets, str) and is_regex(targets)):
        raise CheckpointError(f"{path}: target_modules should be a list of names or a regular expression.")
    check_rows_config(config, path)
    return config


def config_rank(config: Mapping[str, Any], module: str) -> int:
    """Return the rank that an adapter's config gives a module."""
    return by_pattern(config.get("rank_pattern") or {}, module, config["r"])


def config_scaling(config: Mapping[str, Any], module: str) -> float:
    """Return the factor on a module's B A by an adapter's config, as PEFT computes it."""
    alpha = by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return scaling(config_rank(config, module), alpha, bool(config.get("use_rslora")))


def adapter_scalings(folder: Path, modules: Iterable[str]) -> dict[str, float]:
    """Return the factor on B A of each module.

    Args:
        folder: Folder of the adapter.
        modules: Names of the modules.

    Raises:
        CheckpointError: The adapter's initialization changed the base's weights.
    """
    config = read_adapter_config(folder)
    if str(config.get("init_lora_weights")).lower().startswith(CHANGING_INITS):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has init_lora_weights: {config['init_lora_weights']}, which changed the base's "
            "weights; only plain LoRA on the published base is supported. Convert the adapter to plain LoRA with the "
            "tool that made it."
        )
    return {module: config_scaling(config, module) for module in modules}


def read_adapter_header(folder: Path) -> dict[str, Any]:
    """Read dtype, shape and offsets of an adapter's tensors, by name.

    Raises:
        CheckpointError: The file is missing or damaged, or factors in it are not matrices.
    """
    path = _weights_file(folder)
    try:
        header = read_header(path)
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    for name, entry in header.items():
        is_factor = name.endswith((".lora_A.weight", ".lora_B.weight"))
        if is_factor and (len(entry["shape"]) != 2 or entry["dtype"] not in FACTOR_DTYPES):
            raise CheckpointError(
                f"{path}: {name} is not a LoRA factor: {entry['dtype']} {entry['shape']}; save or download it again."
            )
    return header


def read_adapter_tensors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Read the factors by module name: A (rank, in) and B (out, rank).

    Raises:
        CheckpointError: The file is missing, damaged, or has tensors other than pairs of factors and trained rows.
    """
    path, header = folder / WEIGHTS_FILE, read_adapter_header(folder)
    for name, rows in read_adapter_rows(folder).items():
        header.pop(rows.tensor)
        header.pop(f"{PREFIX}{name}.bias", None)
    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in header}
    expected = {f"{PREFIX}{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    if expected != set(header):
        raise CheckpointError(
            f"{path}: tensors that are not pairs of LoRA factors: {', '.join(sorted(expected ^ set(header))[:4])}."
        )
    pairs = {name: [f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB"] for name in sorted(names)}
    for name, (key_A, key_B) in pairs.items():
        if header[key_A]["shape"][0] != header[key_B]["shape"][1]:
            raise CheckpointError(f"{path}: {name} has factors {header[key_A]['shape']} and {header[key_B]['shape']}.")
    tensors = load_file(path)
    return {name: (tensors[key_A], tensors[key_B]) for name, (key_A, key_B) in pairs.items()}


def read_adapter_rows(folder: Path) -> dict[str, StoredRows]:
    """Read the tensor and ids of the rows trained in full, by module name.

    Raises:
        CheckpointError: The adapter is missing or damaged, or its config and file list different rows.
    """
    return read_rows(read_adapter_config(folder), read_adapter_header(folder))


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Copy an adapter's factors and trained rows into a model with the same adapted layers.

    Raises:
        CheckpointError: The adapter's modules, shapes, rows or scalings differ from the model's; names them.
    """
    factors, layers = read_adapter_tensors(folder), dict(lora_layers(model))
    scalings = adapter_scalings(folder, factors)
    if set(factors) != set(layers):
        mismatches = sorted(set(factors) ^ set(layers))
        raise CheckpointError(
            f"{folder}: adapter and model differ in {len(mismatches)} modules: {', '.join(mismatches[:4])} …"
        )
    for name, (lora_A, lora_B) in factors.items():
        layer = layers[name]
        if lora_A.shape != layer.lora_A.shape or lora_B.shape != layer.lora_B.shape:
            raise CheckpointError(
                f"{folder}: {name} has factors {tuple(lora_A.shape)} and {tuple(lora_B.shape)}, "
                f"the model {tuple(layer.lora_A.shape)} and {tuple(layer.lora_B.shape)}."
            )
        if not math.isclose(scalings[name], layer.spec.scaling):
            raise CheckpointError(
                f"{folder}: {name} has a scaling of {scalings[name]:g}, the run trained with {layer.spec.scaling:g}."
            )
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    load_rows(model, read_adapter_rows(folder), load_file(folder / WEIGHTS_FILE))


def _target_modules(model: nn.Module, adapted: list[str]) -> list[str]:
    """Return the last parts of the adapted names if these select exactly the adapted layers, else full names."""
    parts = sorted({name.rpartition(".")[2] for name in adapted})
    linears = [name.removesuffix(".base") for name, module in model.named_modules() if hasattr(module, "in_features")]
    selected = {name for name in linears if name.rpartition(".")[2] in parts}
    return parts if selected == set(adapted) else sorted(adapted)
