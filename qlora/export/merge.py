"""Merge an adapter into release weights, in the format asked for."""

from collections.abc import Callable
from pathlib import Path

from qlora.checkpoint import RunDirectory, record_release
from qlora.errors import ExportError
from qlora.export.companions import MergeReport, OnProgress
from qlora.export.folder import DEFAULT_SHARD_SIZE, merge_to_folder
from qlora.export.gguf.adapter import FORMAT as ADAPTER_FORMAT
from qlora.export.gguf.adapter import adapter_to_gguf
from qlora.export.gguf.merge import merge_to_gguf
from qlora.export.held_out import Judge
from qlora.model import BITSANDBYTES_4BIT, AdapterSource, open_source, weight_format
from qlora.pages import refresh_page

FORMATS = ("safetensors", "gguf", ADAPTER_FORMAT)


def merge(
    run_dir: str | Path,
    out_dir: str | Path,
    dtype: str = "float16",
    onto: str | None = None,
    max_shard_size: str | None = None,
    device: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    format: str = "safetensors",
    base: str | None = None,
    judge_of: Callable[[RunDirectory], Judge] = lambda _: Judge(),
) -> MergeReport:
    """Merge an adapter into its base, and write weights that need neither qlora nor PEFT.

    Args:
        run_dir: A finished run, a checkpoint of a run, or a folder or hub id of a PEFT adapter made elsewhere.
        out_dir: A new folder; it appears once everything in it is written.
        dtype: `float16`, `bfloat16` or `float32`; for GGUF `float16`, `bfloat16`, `q8_0`, `q5_0` or `q4_0`, or a
            type of llama.cpp's own quantizer if that is installed: `q6_k`, `q5_k_m`, `q5_k_s`, `q4_k_m` or `q4_k_s`.
        onto: Base weights to merge onto: `dequantized`, those that a run's adapter was trained on; `original`, those of
            the base's files; or `best`, the ones with the lower loss on a run's held-out examples. `best` needs disk
            space for both and loads each merged model in turn; not for GGUF. None for `dequantized` with a run, and
            for `original` otherwise, because it is not known what an adapter made elsewhere was trained on.
        max_shard_size: Size limit of a weight file, such as `5GB`, the default; not for GGUF, which is one file.
        device: Device to merge and evaluate on; see :class:`qlora.export.weights.MergedWeights`.
        force: Merge into a base other than the one used in training; the report names the files that differ.
        on_progress: Called with the bytes written so far and the total.
        format: `safetensors`, a folder that transformers loads; `gguf`, a file for llama.cpp; or `lora-gguf`, a file
            with the adapter alone, in fp32, which llama.cpp applies to any GGUF file of the base. It merges nothing, so
            `dtype`, `onto`, `device` and `force` have no effect on it.
        base: Base of an adapter made elsewhere, a folder or hub id; None for the one that its config names.
        judge_of: Returns what `best` compares the merges of a run by; the supervised loss by
            default.

    Raises:
        ExportError: An argument is unknown, the folder exists, the base is not the one used in training, a value does
            not fit the dtype, the model can't be written as GGUF, or the disk is full.
        CheckpointError: The run or the adapter is damaged, or the adapter is not LoRA that can be computed here.
        ConfigError: A run is given a base, or the base of an adapter made elsewhere is not known.
    """
    if format not in FORMATS:
        raise ExportError(f"format: {format!r} should be one of {', '.join(FORMATS)}.")
    source = open_source(run_dir, base)
    if onto is None:
        onto = default_onto(source)
    if format != "safetensors":
        if source.head is not None:
            raise ExportError(
                f"format: {run_dir} scores texts, and only models that predict tokens are written as GGUF; omit it."
            )
        if max_shard_size is not None:
            raise ExportError(
                f"max_shard_size: {max_shard_size!r} has no meaning for GGUF, which is one file; omit it."
            )
    if format == ADAPTER_FORMAT:
        report = adapter_to_gguf(source, out_dir)
    elif format == "gguf":
        report = merge_to_gguf(source, out_dir, dtype, onto, device=device, force=force, on_progress=on_progress)
    else:
        shard_size = DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size
        report = merge_to_folder(
            source, out_dir, dtype, onto, max_shard_size=shard_size, device=device, force=force,
            on_progress=on_progress, judge=Judge() if source.run is None else judge_of(source.run),
        )  # fmt: skip
    if source.run is not None:
        record_release(source.run, "merge", report.as_dict())
        refresh_page(source.run)
    return report


def default_onto(source: AdapterSource) -> str:
    """Return the base weights to merge onto if nothing else is asked for: for a run, those that it trained on."""
    if source.run is not None or weight_format(source.base_files()) == BITSANDBYTES_4BIT:
        return "dequantized"
    return "original"
