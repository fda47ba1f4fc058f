"""Folders of PEFT adapters: config and tensors, checked to be LoRA that this package can compute."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora.checkpoint.adapter_experts import is_linear_parameter, read_experts, stored_experts
from qlora.checkpoint.adapter_rows import PREFIX, StoredRows, check_rows_config, read_rows
from qlora.errors import CheckpointError, ModelError
from qlora.files.base_files import describe_pickles
from qlora.files.headers import read_header
from qlora.files.json_files import read_object
from qlora.lora import StoredAdapter, StoredExperts
from qlora.lora.head import SCORES
from qlora.lora.spec import by_pattern, is_pattern_map, is_regex, scaling

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Above the width of any layer.
MAX_RANK = 1 << 20
LARGEST_ALPHA = 1e30
# Values of init_lora_weights that change the base's weights, so that the adapter does not fit the published base.
CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")
# PEFT's name for models that score documents.
SCORER_TASK = "SEQ_CLS"
FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")
# Name of the norms of the rows, which DoRA trains, in the file.
MAGNITUDE = "lora_magnitude_vector"
# PEFT's keys for computations other than c ∘ (W + scaling · B A), and what they stand for.
UNSUPPORTED = {
    "lora_bias": "biases of the factors",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal factors",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "replicated layers",
}


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What an adapter's folder holds; tensors are memory-mapped, so unread values take no memory.

    Attributes:
        folder: The folder.
        config: Its `adapter_config.json`.
        layers: Updates by the names of the layers.
        experts: Updates by the names of the stacks of experts.
        rows: Rows of embedding and head trained in full, by the names of the modules.
        tensors: All tensors by their names in the file.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, StoredAdapter]
    experts: dict[str, StoredExperts]
    rows: dict[str, StoredRows]
    tensors: dict[str, torch.Tensor]


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
    """Return the rank that an adapter's config gives a module, or a stack of experts."""
    return by_pattern(config.get("rank_pattern") or {}, _key(config, module), config["r"])


def config_alpha(config: Mapping[str, Any], module: str) -> float:
    """Return the alpha that an adapter's config gives a module, or a stack of experts."""
    return by_pattern(config.get("alpha_pattern") or {}, _key(config, module), config["lora_alpha"])


def _key(config: Mapping[str, Any], module: str) -> str:
    """Return what PEFT compares patterns with."""
    return f"{module}.weight" if is_linear_parameter(config, module) else module


def config_scaling(config: Mapping[str, Any], module: str) -> float:
    """Return the factor on a module's B A by an adapter's config, as PEFT computes it."""
    return scaling(config_rank(config, module), config_alpha(config, module), bool(config.get("use_rslora")))


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


def stored_scores(folder: Path) -> int | None:
    """Return the number of scores that an adapter's head gives a document; None if it is for another kind of head.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    if read_adapter_config(folder).get("task_type") not in (SCORER_TASK, None):  # PEFT has none for images
        return None
    header = read_adapter_header(folder)
    shapes = (header.get(f"{PREFIX}{name}.weight", {}).get("shape", []) for name in SCORES)
    return next((int(shape[0]) for shape in shapes if len(shape) == 2), None)


def read_adapter(folder: Path) -> PeftAdapter:
    """Read an adapter: the one reader that loading, merging and verifying share.

    Raises:
        CheckpointError: A file is missing or damaged, or the adapter is not LoRA that can be computed here; names all
            such problems.
    """
    header, config = read_adapter_header(folder), read_adapter_config(folder)
    rows, problems = read_rows(config, header)
    problems = _unsupported(config) + problems
    experts, others_problems = read_experts(config, header)
    problems += others_problems
    used = {name for each in rows.values() for name in (each.tensor, each.bias) if name}
    used |= {key for keys in experts.values() for key in keys}
    # PEFT stores LoRA on an embedding under other names, and base weights with LoRA on embedding or head.
    others = {
        key: re.split(r"\.lora_embedding_|\.base_layer\.", key.removeprefix(PREFIX))[0] for key in {*header} - used
    }
    vocabulary = {key: name for key, name in others.items() if key != f"{PREFIX}{name}"}
    problems += [
        f"LoRA on the embedding or output head {name} is not supported, only rows of it trained in full"
        for name in sorted({*vocabulary.values()})
    ]
    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in {*header} - used - {*vocabulary}}
    keys = {name: tensor_names(name, bool(config.get("use_dora"))) for name in sorted(names)}
    unknown = sorted(({key for own in keys.values() for key in own} ^ {*header}) - used - {*vocabulary})
    if unknown:
        first = ", ".join(unknown[:4]) + (" …" if len(unknown) > 4 else "")
        problems.append(f"{WEIGHTS_FILE} has tensors that are not pairs of LoRA factors: {first}")
    for name, own in keys.items():
        if any(key not in header for key in own):
            continue
        (rank, _), (out, other), *magnitudes = (header[key]["shape"] for key in own)
        if rank != other:
            problems.append(f"{name} has factors {header[own[0]]['shape']} and {header[own[1]]['shape']}")
        elif rank != config_rank(config, name):
            problems.append(f"{name} has factors of rank {rank}, {CONFIG_FILE} says {config_rank(config, name)}")
        if magnitudes and magnitudes[0] != [out]:
            problems.append(f"{name} has a magnitude of the shape {magnitudes[0]}, not [{out}]")
    for name, pair in experts.items():
        if all(key in header for key in pair):
            (rows_of_A, _), (_, columns_of_B) = (header[key]["shape"] for key in pair)
            if rows_of_A != columns_of_B or rows_of_A % config_rank(config, name):
                problems.append(
                    f"{name} has factors of {rows_of_A} and {columns_of_B} components, which are not experts of rank "
                    f"{config_rank(config, name)}, as {CONFIG_FILE} says"
                )
    if problems:
        raise CheckpointError(f"{folder} can't be used:\n" + "\n".join(f"  {problem}" for problem in problems))
    tensors = load_file(folder / WEIGHTS_FILE)
    layers = {
        name: StoredAdapter(tensors[key_A], tensors[key_B], config_scaling(config, name), *map(tensors.get, magnitudes))
        for name, (key_A, key_B, *magnitudes) in keys.items()
    }
    of_experts = {
        name: stored_experts(tensors[key_A], tensors[key_B], config_rank(config, name), config_scaling(config, name))
        for name, (key_A, key_B) in experts.items()
    }
    return PeftAdapter(folder, config, layers, of_experts, rows, tensors)


def tensor_names(layer: str, has_magnitude: bool) -> list[str]:
    """Return the names of a layer's tensors in the file: of A, B and, with DoRA, the magnitude."""
    names = [f"{PREFIX}{layer}.lora_A.weight", f"{PREFIX}{layer}.lora_B.weight"]
    return [*names, f"{PREFIX}{layer}.{MAGNITUDE}"] if has_magnitude else names


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting of a config that asks for more than c ∘ (W + scaling · B A)."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type: {config.get('peft_type')!r} is not supported, only 'LORA'")
    if config.get("bias", "none") != "none":
        problems.append(f"bias: {config['bias']!r} is not supported, only 'none': trained biases can't be loaded")
    problems += [f"{key}: {feature} is not supported" for key, feature in UNSUPPORTED.items() if config.get(key)]
    init = config.get("init_lora_weights")
    if str(init).lower().startswith(CHANGING_INITS):
        problems.append(
            f"init_lora_weights: {init} changed the base's weights, so the adapter fits no published base; convert it "
            "to plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    return problems
