"""Training state on disk: everything that a continued run needs, whole or not at all."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qlora.checkpoint.adapter import WEIGHTS_FILE, load_adapter, save_adapter
from qlora.errors import CheckpointError
from qlora.files.atomic import atomic_folder, discard
from qlora.files.json_files import parse_object, read_object
from qlora.optim import FlatOptimizer

MANIFEST = "manifest.json"
OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "progress.json"
ORIGIN_FILE = "origin.json"
NEEDED_FILES = {WEIGHTS_FILE, OPTIMIZER_FILE, PROGRESS_FILE, ORIGIN_FILE}
# Of JSON and headers, beside the tensors.
SMALL_BYTES = 1 << 20


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: FlatOptimizer,
    progress: dict[str, Any],
    base_name: str,
    origin: dict[str, Any],
) -> None:
    """Writes adapter, optimizer, progress and origin, with a manifest of sizes and hashes.

    Batches, schedule and dropout follow from the step and the config's seed; the rounding generator's state is
    the optimizer's.

    Args:
        folder: Of this checkpoint.
        model: With adapters.
        optimizer: Over them.
        progress: Plain values that the loop continues from.
        base_name: For the adapter's config.
        origin: Plain values that tell runs apart: a checkpoint goes on in none but its own.

    Raises:
        CheckpointError: The disk is full or can't be written; nothing half-written is left.
    """
    with atomic_folder(folder, needed=checkpoint_bytes(model, optimizer)) as staging:
        save_adapter(model, staging, base_name)
        save_file({key: value.cpu().contiguous() for key, value in optimizer.state_dict().items()},
                  staging / OPTIMIZER_FILE)  # fmt: skip
        (staging / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        (staging / ORIGIN_FILE).write_text(json.dumps(origin, indent=2), encoding="utf-8")
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in staging.iterdir()}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def load_state(folder: Path, model: nn.Module, optimizer: FlatOptimizer) -> dict[str, Any]:
    """Restores a checkpoint into a model and optimizer made from the same config.

    Returns:
        The progress that was saved.

    Raises:
        CheckpointError: A file is missing or damaged, or belongs to another run.
    """
    check_whole(folder)
    load_adapter(model, folder)
    try:
        optimizer.load_state_dict(load_file(folder / OPTIMIZER_FILE))
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} was not saved by a run of this kind, or by another version of qlora: {error}. Continue it with "
            "that version, or choose another train.output_dir."
        ) from None
    return read_object(folder / PROGRESS_FILE, CheckpointError, f"remove {folder} to continue from an earlier one")


def read_origin(folder: Path) -> dict[str, Any]:
    """What tells a whole checkpoint's run apart from others."""
    return read_object(folder / ORIGIN_FILE, CheckpointError, f"remove {folder} to continue from an earlier one")


def checkpoint_bytes(model: nn.Module, optimizer: FlatOptimizer) -> int:
    """What a checkpoint takes on the disk."""
    return adapter_bytes(model) + sum(value.nbytes for value in optimizer.state_dict().values()) + SMALL_BYTES


def adapter_bytes(model: nn.Module) -> int:
    """What the trained parameters take on the disk."""
    # Those of embedding and head are written for both, though they be one.
    named = model.named_parameters(remove_duplicate=False)
    return sum(parameter.nbytes for _, parameter in named if parameter.requires_grad)


def newest_whole(checkpoints: list[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and what is wrong with each that is newer.

    Args:
        checkpoints: The oldest first.
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
    """Compares every file with the manifest.

    Raises:
        CheckpointError: One is missing or differs.
    """
    try:
        manifest = parse_object((folder / MANIFEST).read_bytes())
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: its {MANIFEST} can't be read: {error!r}.") from None
    if foreign := [name for name in manifest if Path(name).name != name]:
        raise CheckpointError(f"{folder} is no whole checkpoint: its {MANIFEST} names {foreign[0]!r:.80}.")
    if lacking := NEEDED_FILES.difference(manifest):
        raise CheckpointError(f"{folder} is no whole checkpoint: its {MANIFEST} lacks {', '.join(sorted(lacking))}.")
    for name, size, digest in entries:
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
            raise CheckpointError(f"{path} is missing or damaged; remove {folder} to continue from an earlier one.")


def quarantine(folder: Path) -> Path:
    """Gives a damaged checkpoint a name that no run continues from, and returns it.

    Raises:
        CheckpointError: The disk refuses.
    """
    target = folder.with_name(f"{folder.name}.damaged")
    if target.exists():
        discard(target)
    try:
        return folder.rename(target)
    except OSError as error:
        raise CheckpointError(f"{folder} is damaged, and can't be renamed to {target.name}: {error}.") from error


def drop_old_checkpoints(checkpoints: list[Path], keep: int) -> None:
    """Removes all but the newest."""
    for folder in checkpoints[:-keep]:
        discard(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
