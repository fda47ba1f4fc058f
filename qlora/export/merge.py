"""Adapters merged into the base's weights, written as a plain model folder."""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import RunDirectory, write_aside
from qlora.config.sections import parse_size
from qlora.errors import ExportError
from qlora.export.shards import ShardWriter
from qlora.export.weights import MergedWeights
from qlora.model import end_token_ids

REPORT_FILE = "merge_report.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written.

    Attributes:
        out_dir: The model folder.
        dtype: Of its weights.
        onto: `dequantized` or `original` base weights.
        merged: Layers that an adapter was added to: all that the run adapted.
        tensors: In the folder.
        num_bytes: Of its tensors.
        seconds: Taken.
    """

    out_dir: str
    run_dir: str
    dtype: str
    onto: str
    merged: int
    tensors: int
    num_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def merge(
    run_dir: str | Path,
    out_dir: str | Path,
    dtype: str = "float16",
    onto: str = "dequantized",
    max_shard_size: str = "5GB",
) -> MergeReport:
    """Merges a run's adapter into its base and writes a folder that transformers loads alone.

    Each tensor is read, merged in fp32, cast once, checked and written before the next is read.

    Args:
        run_dir: A finished run.
        out_dir: A folder that is not there yet; written aside and renamed when whole.
        dtype: `float16`, `bfloat16` or `float32`.
        onto: `dequantized`, the weights that the adapter was trained on, or `original`, those of the files.
        max_shard_size: Of a weight file.

    Raises:
        ExportError: The folder exists, the base is another, a value does not fit the dtype, the disk is full.
        CheckpointError: The run is damaged.
    """
    started = time.perf_counter()
    out_dir = Path(out_dir).expanduser()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ExportError(f"{out_dir} exists already; choose another folder or remove it.")
    run = RunDirectory.open(run_dir)
    weights = MergedWeights(run, onto)
    layout = weights.layout(getattr(torch, dtype))
    with write_aside(out_dir, ExportError) as folder:
        writer = ShardWriter(folder, layout, parse_size(max_shard_size))
        for entry in layout:
            writer.write(entry.name, cast_checked(entry.name, weights.tensor(entry.name), entry.dtype))
        writer.close()
        _write_companions(folder, run, weights, dtype)
        seconds = round(time.perf_counter() - started, 3)
        report = MergeReport(
            str(out_dir),
            str(run.path),
            dtype,
            onto,
            weights.num_adapted,
            len(layout),
            writer.num_bytes,
            seconds,
        )
        (folder / REPORT_FILE).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    return report


def cast_checked(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds fp32 to the target, once.

    Raises:
        ExportError: A value is not finite there.
    """
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise ExportError(
            f"{name}: a value of {tensor.abs().max().item():.6g} does not fit {kind} (largest "
            f"{torch.finfo(dtype).max:g}); merge with --dtype bfloat16 or float32."
        )
    return cast


def _write_companions(folder: Path, run: RunDirectory, weights: MergedWeights, dtype: str) -> None:
    """Config, tokenizer with its template, and generation config, beside the weights."""
    from transformers import AutoTokenizer, GenerationConfig

    config = dict(weights.files.config)
    config.pop("quantization_config", None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in run.adapter.iterdir():
        if path.name not in ADAPTER_FILES:
            shutil.copyfile(path, folder / path.name)
    for pattern in ("tokenizer.model", "LICENSE*"):
        for path in weights.files.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)

    source = weights.files.folder / "generation_config.json"
    generation = GenerationConfig.from_pretrained(source.parent) if source.is_file() else GenerationConfig()
    generation.eos_token_id = end_token_ids(generation, AutoTokenizer.from_pretrained(run.adapter))
    generation.save_pretrained(folder)
