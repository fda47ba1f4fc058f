"""Merge an adapter into a folder of safetensors files that transformers loads without qlora."""

import hashlib
import json
import math
import time
from pathlib import Path

import torch

from qlora.checkpoint import adapter_digest
from qlora.config.sections import parse_size
from qlora.dtypes import full_name
from qlora.errors import ExportError
from qlora.export.companions import (
    ADAPTER_FILES,
    MergeReport,
    OnProgress,
    write_companions,
    write_report_and_card,
)
from qlora.export.held_out import Judge, held_out_examples, written_loss
from qlora.export.rounding import UpdateRounding
from qlora.export.weights import ONTO, MergedWeights
from qlora.files.resumable import new_folder, put_in_place, resumable_folder
from qlora.files.shards import ShardWriter
from qlora.model import AdapterSource, load_run_tokenizer

DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_SHARD_SIZE = "5GB"


def merge_to_folder(
    source: AdapterSource,
    out_dir: str | Path,
    dtype: str,
    onto: str,
    max_shard_size: str,
    device: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    judge: Judge = Judge(),  # noqa: B008 (frozen)
) -> MergeReport:
    """Merge an adapter into its base, and write a folder that transformers loads; see :func:`qlora.merge`.

    Each tensor is read in blocks of rows, merged in fp32, cast once, checked and written before the next is read. The
    same call resumes an interrupted merge.
    """
    started = time.perf_counter()
    dtype = full_name(dtype)
    if dtype not in DTYPES:
        raise ExportError(f"dtype: {dtype!r} should be one of {', '.join(DTYPES)}.")
    try:
        max_bytes = parse_size(max_shard_size)
    except (ValueError, TypeError):
        raise ExportError(f"max_shard_size: {max_shard_size!r} should be a size such as 5GB or 500MB.") from None
    out_dir = new_folder(out_dir)
    # Read before the weights: if the run continues meanwhile, the report must not claim its newer adapter.
    step, adapter = source.step, adapter_digest(source.folder)
    candidates = {base: MergedWeights(source, base, device, force) for base in (ONTO if onto == "best" else (onto,))}
    weights = next(iter(candidates.values()))
    layout = weights.layout(getattr(torch, dtype))
    num_bytes = sum(tensor.num_bytes for tensor in layout)
    key = _key(source, weights, dtype, onto, max_bytes)
    progress = _Progress(on_progress, num_bytes * len(candidates))
    losses: dict[str, float] = {}
    if onto == "best":  # read now, so that missing data are reported before anything is written
        if source.run is None:
            raise ExportError("onto: 'best' needs the held-out examples of a run; use original or dequantized.")
        if (source.head is None) != (judge.loss.head is None):
            raise ExportError(
                "onto: 'best' needs the loss of the run's objective, as its model scores texts; call qlora.merge, or "
                "use original or dequantized."
            )
        examples = held_out_examples(source.run, load_run_tokenizer(source.run))
    with resumable_folder(out_dir, key, num_bytes * len(candidates)) as staging:
        notes = {}
        for base, candidate in candidates.items():
            notes[base] = candidate.notes + _write_weights(staging / base, candidate, dtype, max_bytes, progress)
            write_companions(staging / base, candidate, dtype)
            if onto == "best":
                losses[base] = written_loss(
                    staging / base, dtype, examples, judge.loss, candidate.device, source.trust_remote_code
                )
        chosen = _better(losses, dtype) if losses else onto
        report = MergeReport(
            out_dir=str(out_dir),
            run_dir=str(source.path),
            step=step,
            adapter=adapter,
            dtype=dtype,
            onto=chosen,
            losses=losses or None,
            merged=weights.num_adapted,
            tensors=len(layout),
            num_bytes=num_bytes,
            continued_bytes=progress.continued,
            device=weights.device.type,
            base_differs=weights.base_differs,
            seconds=round(time.perf_counter() - started, 3),
            notes=notes[chosen] + _notes_on_losses(losses, source, judge),
        )
        write_report_and_card(staging / chosen, report, source, weights.files.folder)
        put_in_place(staging / chosen, out_dir)
    return report


def cast_checked(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round an fp32 tensor to a dtype.

    Raises:
        ExportError: A value is not finite in the dtype.
    """
    cast = tensor.to(dtype)
    # A finite sum proves every value finite, and is much faster than a check of each; but a sum can also overflow.
    if cast.is_floating_point() and not math.isfinite(cast.sum()) and not cast.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        largest = tensor.abs().max().item()
        remedy = (
            "merge with --dtype bfloat16 or float32"
            if math.isfinite(largest)
            else "base or adapter is damaged; download the base again or take another checkpoint"
        )
        raise ExportError(
            f"{name}: a value of {largest:.6g} does not fit {kind} (largest {torch.finfo(dtype).max:g}); {remedy}."
        )
    return cast


def _better(losses: dict[str, float], dtype: str) -> str:
    """Return the base with the lowest finite loss; the first of equal ones.

    Raises:
        ExportError: No loss is finite.
    """
    finite = {base: loss for base, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ExportError(f"Neither base has a finite loss in {dtype}; merge with --dtype bfloat16 or float32.")
    return min(finite, key=lambda base: finite[base])


def _notes_on_losses(losses: dict[str, float], source: AdapterSource, judge: Judge) -> list[str]:
    """Return notes if the losses by base are not held-out losses, or not those of the run's objective."""
    if not losses or source.run is None:
        return []
    notes = [] if judge.note is None else [judge.note]
    if not source.run.read_record().examples.eval:
        notes.append("the run has no held-out examples, so the losses by base are training losses")
    return notes


class _Progress:
    """Count of the bytes written so far.

    Args:
        on_progress: Called after every addition.
        total: Bytes that will be written.

    Attributes:
        continued: Bytes that an interrupted merge wrote.
    """

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0
        self.continued = 0

    def add(self, num_bytes: int, continued: bool = False) -> None:
        """Add bytes that were written now, or by an interrupted merge."""
        self._done += num_bytes
        self.continued += num_bytes * continued
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)


def _key(source: AdapterSource, weights: MergedWeights, dtype: str, onto: str, max_bytes: int) -> str:
    """Return a key that is equal only for merges that write the same bytes."""
    digest = hashlib.sha256()
    record = [] if source.run is None else [source.run.record]
    for path in (*record, *(source.folder / name for name in ADAPTER_FILES)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    settings = [weights.files.fingerprint(), dtype, onto, max_bytes, weights.device.type]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _write_weights(folder: Path, weights: MergedWeights, dtype: str, max_bytes: int, progress: _Progress) -> list[str]:
    """Write the tensors that are not in the folder yet.

    Returns:
        Notes on what rounding them does to the update.
    """
    folder.mkdir(exist_ok=True)
    rounding = UpdateRounding(getattr(torch, dtype))
    writer = ShardWriter(folder, weights.layout(getattr(torch, dtype)), max_bytes)
    remaining = list(writer.remaining)
    progress.add(writer.num_bytes - sum(entry.num_bytes for entry in remaining), continued=True)
    for entry in remaining:
        merged = map(rounding.counted, weights.blocks(entry.name, rounding.keep))
        writer.write_blocks(entry.name, (cast_checked(entry.name, block, entry.dtype) for block in merged))
        progress.add(entry.num_bytes)
    writer.close()
    return rounding.notes
