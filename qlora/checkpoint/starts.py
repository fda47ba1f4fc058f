"""The file of a run's starts: initial values and frozen terms of its adapters that don't follow from the seed."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qlora.errors import CheckpointError
from qlora.files.atomic import write_bytes
from qlora.lora import LayerStart, starts_from_tensors, starts_to_tensors


def write_starts(path: Path, starts: Mapping[str, LayerStart]) -> None:
    """Write the starts of a run's layers; whole, or not at all."""
    write_bytes(path, save(starts_to_tensors(starts)))


def read_starts(path: Path) -> dict[str, LayerStart]:
    """Read the starts of a run's layers, by their names.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, which holds the initial values of the run's adapters; restore it, or train again with "
            "--fresh."
        )
    try:
        return starts_from_tensors(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore it, or train again with --fresh.") from None
