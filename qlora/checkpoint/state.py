"""Training state on disk: everything that a continued run needs, whole or not at all."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from qlora.checkpoint.adapter import load_adapter, save_adapter
from qlora.checkpoint.atomic import write_aside
from qlora.errors import CheckpointError
from qlora.optim import FlatAdamW

MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: FlatAdamW, progress: dict[str, Any], base_name: str
) -> None:
    """Writes adapter, optimizer and progress, with a manifest of sizes and hashes.

    Batches, schedule and dropout follow from the step and the config's seed; the rounding generator's state is
    the optimizer's.

    Args:
        folder: Of this checkpoint.
        model: With adapters.
        optimizer: Over them.
        progress: Plain values that the loop continues from.
        base_name: For the adapter's config.

    Raises:
        CheckpointError: The disk is full or can't be written; nothing half-written is left.
    """
    with write_aside(folder) as aside:
        save_adapter(model, aside, base_name)
        save_file({key: value.cpu().contiguous() for key, value in optimizer.state_dict().items()},
                  aside / "optimizer.safetensors")  # fmt: skip
        (aside / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in aside.iterdir()}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def load_state(folder: Path, model: nn.Module, optimizer: FlatAdamW) -> dict[str, Any]:
    """Restores a checkpoint into a model and optimizer made from the same config.

    Returns:
        The progress that was saved.

    Raises:
        CheckpointError: A file is missing or damaged, or belongs to another run.
    """
    check_whole(folder)
    load_adapter(model, folder)
    try:
        optimizer.load_state_dict(load_file(folder / "optimizer.safetensors"))
    except ValueError as error:
        raise CheckpointError(
            f"{folder} was not saved by a run of this kind, or by another version of qlora: {error}. Continue it with "
            "that version, or choose another train.output_dir."
        ) from None
    return json.loads((folder / "progress.json").read_text(encoding="utf-8"))


def check_whole(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: One is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from None
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is missing or damaged; remove {folder} to continue from an earlier one.")


def drop_old_checkpoints(checkpoints: list[Path], keep: int) -> None:
    """Removes all but the newest."""
    for folder in checkpoints[:-keep]:
        shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
