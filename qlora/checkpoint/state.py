"""Training state on disk: everything that a run needs to continue, written completely or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qlora.checkpoint.adapter import load_adapter, save_adapter
from qlora.checkpoint.peft_folder import WEIGHTS_FILE
from qlora.errors import CheckpointError
from qlora.files.atomic import atomic_folder, discard
from qlora.files.json_files import parse_object, read_object
from qlora.lora import RankBudget, lora_experts, lora_layers, trained_rows
from qlora.optim import FlatOptimizer

MANIFEST = "manifest.json"
OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "progress.json"
# The trained parameters, where the adapter's file does not hold them as they are.
PARAMETERS_FILE = "parameters.safetensors"
# Importance of the components, and which are left, where ranks shrink.
RANKS_FILE = "ranks.safetensors"
ORIGIN_FILE = "origin.json"
NEEDED_FILES = {WEIGHTS_FILE, OPTIMIZER_FILE, PROGRESS_FILE, ORIGIN_FILE}
# Bytes of JSON files and headers, in addition to the tensors.
SMALL_BYTES = 1 << 20


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: FlatOptimizer,
    progress: dict[str, Any],
    base_name: str,
    origin: dict[str, Any],
    ranks: RankBudget | None = None,
) -> None:
    """Write adapter, optimizer, progress and origin, with a manifest of sizes and hashes.

    Batches, schedule and dropout follow from the step and the config's seed; the optimizer's state includes that of the
    rounding generator.

    Args:
        folder: Folder of the checkpoint.
        model: Model with adapters.
        optimizer: Optimizer of the adapters.
        progress: JSON values that the loop continues from.
        base_name: Folder or hub id of the base, for the adapter's config.
        origin: JSON values that identify the run; a checkpoint continues only in its own run.
        ranks: Budget of the adapters' components, if it shrinks.

    Raises:
        CheckpointError: The disk is full or can't be written; no partial files are left.
    """
    with atomic_folder(folder, needed=checkpoint_bytes(model, optimizer, ranks)) as staging:
        save_adapter(model, staging, base_name)
        _save(optimizer.state_dict(), staging / OPTIMIZER_FILE)
        if not _is_stored_exactly(model):
            _save(_trained(model), staging / PARAMETERS_FILE)
        if ranks is not None:
            _save(ranks.state_dict(), staging / RANKS_FILE)
        (staging / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        (staging / ORIGIN_FILE).write_text(json.dumps(origin, indent=2), encoding="utf-8")
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in staging.iterdir()}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def load_state(
    folder: Path, model: nn.Module, optimizer: FlatOptimizer, ranks: RankBudget | None = None
) -> dict[str, Any]:
    """Restore a checkpoint into a model, optimizer and budget of ranks created from the same config.

    Returns:
        The saved progress.

    Raises:
        CheckpointError: A file is missing or damaged, or belongs to another run.
    """
    check_whole(folder)
    try:
        if (folder / PARAMETERS_FILE).is_file():
            _load_parameters(model, load_file(folder / PARAMETERS_FILE))
        else:
            load_adapter(model, folder)
        optimizer.load_state_dict(load_file(folder / OPTIMIZER_FILE))
        if ranks is not None:
            ranks.load_state_dict(load_file(folder / RANKS_FILE))
    except (FileNotFoundError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} was saved by a run with other settings, or by another version of qlora: {error}. Continue it "
            "with that version, or choose another train.output_dir."
        ) from None
    return read_object(folder / PROGRESS_FILE, CheckpointError, f"remove {folder} to continue from an earlier one")


def read_origin(folder: Path) -> dict[str, Any]:
    """Return the values that identify the run of a complete checkpoint.

    Raises:
        CheckpointError: The file is damaged.
    """
    return read_object(folder / ORIGIN_FILE, CheckpointError, f"remove {folder} to continue from an earlier one")


def checkpoint_bytes(model: nn.Module, optimizer: FlatOptimizer, ranks: RankBudget | None = None) -> int:
    """Return the bytes that a checkpoint takes on the disk, at most."""
    tensors = [*optimizer.state_dict().values()]
    if ranks is not None:
        tensors += ranks.state_dict().values()
    if ranks is not None or not _is_stored_exactly(model):  # as they will be once components are removed
        tensors += _trained(model).values()
    return adapter_bytes(model) + sum(tensor.nbytes for tensor in tensors) + SMALL_BYTES


def adapter_bytes(model: nn.Module) -> int:
    """Return the bytes that the trained parameters take on the disk."""
    stored = [layer.stored() for _, layer in lora_layers(model)]
    tensors = [tensor for each in stored for tensor in (each.A, each.B, each.magnitude) if tensor is not None]
    tensors += [factor for _, layer in lora_experts(model) for factor in (layer.lora_A, layer.lora_B)]
    # Rows of a tied embedding and head are written twice.
    tensors += [parameter for _, rows in trained_rows(model) for parameter in rows.trained]
    return sum(tensor.nbytes for tensor in tensors)


def newest_whole(checkpoints: list[Path]) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest complete checkpoint, None if there is none, and the problem of each newer one.

    Args:
        checkpoints: Folders of checkpoints, the oldest first.
    """
    damaged = {}
    for folder in reversed(checkpoints):
        try:
            check_whole(folder)
        except CheckpointError as error:
            damaged[folder] = str(error)
        else:
            return folder, damaged
    return None, damaged


def check_whole(folder: Path) -> None:
    """Check every file of a checkpoint against the manifest.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    try:
        manifest = parse_object((folder / MANIFEST).read_bytes())
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: its {MANIFEST} can't be read: {error!r}."
        ) from None
    if foreign := [name for name in manifest if Path(name).name != name]:
        raise CheckpointError(f"{folder} is not a complete checkpoint: its {MANIFEST} names {foreign[0]!r:.80}.")
    if missing := NEEDED_FILES.difference(manifest):
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: its {MANIFEST} lacks {', '.join(sorted(missing))}."
        )
    for name, size, digest in entries:
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
            raise CheckpointError(f"{path} is missing or damaged; remove {folder} to continue from an earlier one.")


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint so that no run continues from it, and return its new path.

    Raises:
        CheckpointError: It can't be renamed.
    """
    target = folder.with_name(f"{folder.name}.damaged")
    if target.exists():
        discard(target)
    try:
        return folder.rename(target)
    except OSError as error:
        raise CheckpointError(f"{folder} is damaged, and can't be renamed to {target.name}: {error}.") from error


def drop_old_checkpoints(checkpoints: list[Path], keep: int, best: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints of a list, the oldest first, and the best one."""
    for folder in checkpoints[:-keep]:
        if folder != best:
            discard(folder)


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _is_stored_exactly(model: nn.Module) -> bool:
    return all(layer.is_stored_exactly for _, layer in lora_layers(model))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _load_parameters(model: nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Copy trained parameters into a model; raises ValueError if it has others."""
    trained = _trained(model)
    found, wanted = ({name: tuple(value.shape) for name, value in values.items()} for values in (stored, trained))
    if found != wanted:
        names = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
        raise ValueError(f"{len(names)} trained parameters are missing or differ in shape: {', '.join(names[:3])}")
    for name, parameter in trained.items():
        parameter.copy_(stored[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
