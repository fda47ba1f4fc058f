"""Adapters merged into the base's weights, written as a plain model folder."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import RunDirectory, adapter_digest
from qlora.config.sections import parse_size
from qlora.dtypes import full_name
from qlora.errors import ExportError
from qlora.export.card import write_card
from qlora.export.held_out import held_out_examples, written_loss
from qlora.export.weights import ONTO, MergedWeights
from qlora.files.resumable import continued_aside, new_folder, put_in_place
from qlora.files.shards import ShardWriter
from qlora.model import end_token_ids, load_generation_config, load_run_tokenizer
from qlora.model.base import GENERATION_FILE

REPORT_FILE = "merge_report.json"
DTYPES = ("float16", "bfloat16", "float32")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Bytes written and bytes in all.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written.

    Attributes:
        out_dir: The model folder.
        run_dir: The run.
        step: Of the run, that the adapter was trained for.
        adapter: SHA-256 of the adapter's tensors file.
        dtype: Of its weights.
        onto: `dequantized` or `original` base weights.
        losses: Of the model on either, where the better one was asked for: on the run's held-out examples, or, which
            the notes say, on training examples where it held none out.
        merged: Layers that an adapter was added to: all that the run adapted.
        tensors: In the folder.
        num_bytes: Of its tensors.
        continued_bytes: Of what was written, those taken over from an interrupted merge.
        device: That it was computed on.
        base_differs: Files of the base that are not those trained on, where that was asked for all the same.
        seconds: Taken.
        notes: Where what was written is not quite the model.
    """

    out_dir: str
    run_dir: str
    step: int
    adapter: str
    dtype: str
    onto: str
    losses: dict[str, float] | None
    merged: int
    tensors: int
    num_bytes: int
    continued_bytes: int
    device: str
    base_differs: list[str]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def merge(
    run_dir: str | Path,
    out_dir: str | Path,
    dtype: str = "float16",
    onto: str = "dequantized",
    max_shard_size: str = "5GB",
    device: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> MergeReport:
    """Merges a run's adapter into its base and writes a folder that transformers loads alone.

    Each tensor is read in blocks of rows, merged in fp32, cast once, checked and written before the next is read.
    An interrupted merge is continued by the same call.

    Args:
        run_dir: A finished run, or one of a run's checkpoints.
        out_dir: A folder that is not there yet; written aside and renamed when whole.
        dtype: `float16`, `bfloat16` or `float32`.
        onto: `dequantized`, the weights that the adapter was trained on; `original`, those of the files; or `best`,
            whichever has the lower loss on the run's held-out examples. For that both are written, so the disk
            holds twice the model meanwhile, and loaded whole, one after the other.
        max_shard_size: Of a weight file.
        device: To merge and evaluate on, see :class:`qlora.export.weights.MergedWeights`.
        force: Merge into a base other than the one trained on; the report says what differs.
        on_progress: Told of the bytes written, and of all.

    Raises:
        ExportError: The folder exists, the base is another, a value does not fit the dtype, the disk is full.
        CheckpointError: The run is damaged.
    """
    started = time.perf_counter()
    dtype = full_name(dtype)
    if dtype not in DTYPES:
        raise ExportError(f"Weights are written in {', '.join(DTYPES)}, not in {dtype!r}.")
    try:
        max_bytes = parse_size(max_shard_size)
    except (ValueError, TypeError):
        raise ExportError(f"max_shard_size: {max_shard_size!r} should be a size such as 5GB or 500MB.") from None
    out_dir = new_folder(out_dir)
    run = RunDirectory.open(run_dir)
    # Read before the weights: if the run is trained on meanwhile, the report must not claim its newer adapter.
    step, adapter = run.step, adapter_digest(run.adapter)
    candidates = {base: MergedWeights(run, base, device, force) for base in (ONTO if onto == "best" else (onto,))}
    weights = next(iter(candidates.values()))
    layout = weights.layout(getattr(torch, dtype))
    num_bytes = sum(tensor.num_bytes for tensor in layout)
    key = _key(run, weights, dtype, onto, max_bytes)
    progress = _Progress(on_progress, num_bytes * len(candidates))
    has_code = weights.config.model.trust_remote_code
    losses: dict[str, float] = {}
    if onto == "best":  # read now, so that data that are gone are told before anything is written
        examples = held_out_examples(weights.config, load_run_tokenizer(run))
    with continued_aside(out_dir, key, num_bytes * len(candidates)) as aside:
        for base, candidate in candidates.items():
            _write_weights(aside / base, candidate, dtype, max_bytes, progress)
            write_companions(aside / base, run, candidate, dtype)
            if onto == "best":
                losses[base] = written_loss(aside / base, dtype, examples, candidate.device, has_code)
        chosen = _better(losses, dtype) if losses else onto
        report = MergeReport(
            out_dir=str(out_dir),
            run_dir=str(run.path),
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
            notes=candidates[chosen].notes + _notes_on_losses(losses, weights.record),
        )
        write_papers(aside / chosen, report, run, weights.files.folder)
        put_in_place(aside / chosen, out_dir)
    return report


def cast_checked(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds fp32 to the target, once.

    Raises:
        ExportError: A value is not finite there.
    """
    cast = tensor.to(dtype)
    # A sum is finite only where all are, and much faster than looking at each; it may overflow by itself.
    if cast.is_floating_point() and not cast.sum().isfinite() and not cast.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        largest = tensor.abs().max().item()
        remedy = "merge with --dtype bfloat16 or float32" if math.isfinite(largest) else "base or adapter is damaged"
        raise ExportError(
            f"{name}: a value of {largest:.6g} does not fit {kind} (largest {torch.finfo(dtype).max:g}); {remedy}."
        )
    return cast


def write_papers(folder: Path, report: MergeReport, run: RunDirectory, base_folder: Path) -> None:
    """Writes a release's report and card, which say nothing of this machine."""
    name = Path(report.out_dir).name
    released = report.as_dict() | {"out_dir": name, "run_dir": run.path.name}
    (folder / REPORT_FILE).write_text(json.dumps(released, indent=2) + "\n", encoding="utf-8")
    write_card(folder, name, run, base_folder, released)


def _better(losses: dict[str, float], dtype: str) -> str:
    """The base with the lower loss; the first of equals."""
    finite = {base: loss for base, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ExportError(f"Neither base has a finite loss in {dtype}; merge with --dtype bfloat16 or float32.")
    return min(finite, key=lambda base: finite[base])


def _notes_on_losses(losses: dict[str, float], record: dict[str, Any]) -> list[str]:
    """What the losses are of, where it is not what one takes them for."""
    if not losses or record.get("examples", {}).get("eval"):
        return []
    return ["the run held nothing out: the losses by base are of examples that it was trained on"]


class _Progress:
    """Bytes written so far, over all that is to be written.

    Args:
        tell: Is told of every step.
        total: Bytes in all.
    """

    def __init__(self, tell: OnProgress | None, total: int) -> None:
        self._tell, self._total, self._done = tell, total, 0
        self.continued = 0

    def add(self, num_bytes: int, continued: bool = False) -> None:
        """Counts what was written, or taken over."""
        self._done += num_bytes
        self.continued += num_bytes * continued
        if self._tell is not None:
            self._tell(self._done, self._total)


def _key(run: RunDirectory, weights: MergedWeights, dtype: str, onto: str, max_bytes: int) -> str:
    """Tells apart merges that would not write the same bytes."""
    digest = hashlib.sha256()
    for path in (run.record, *(run.adapter / name for name in ADAPTER_FILES)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    settings = [weights.files.fingerprint(), dtype, onto, max_bytes, weights.device.type]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _write_weights(folder: Path, weights: MergedWeights, dtype: str, max_bytes: int, progress: _Progress) -> None:
    """Writes the tensors that are not in the folder yet."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, weights.layout(getattr(torch, dtype)), max_bytes)
    remaining = list(writer.remaining)
    progress.add(writer.num_bytes - sum(entry.num_bytes for entry in remaining), continued=True)
    for entry in remaining:
        blocks = (cast_checked(entry.name, block, entry.dtype) for block in weights.blocks(entry.name))
        writer.write_blocks(entry.name, blocks)
        progress.add(entry.num_bytes)
    writer.close()


def write_companions(folder: Path, run: RunDirectory, weights: MergedWeights, dtype: str) -> None:
    """Config, tokenizer with its template, and generation config, beside the weights."""
    config = dict(weights.files.config)
    config.pop("quantization_config", None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if weights.num_embeddings is not None:
        _set_vocab_size(config, weights.num_embeddings)
    if weights.has_own_head:
        # Of a file's head that differs from the embedding transformers takes notice all the same, others do not.
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = load_run_tokenizer(run)
    if run.final_adapter.is_dir():
        _copy_tokenizer(run.final_adapter, folder)
    else:
        tokenizer.save_pretrained(folder)
    has_code = weights.config.model.trust_remote_code
    for pattern in ("tokenizer.model", "LICENSE*", "NOTICE*", *(["*.py"] if has_code else [])):
        for path in filter(Path.is_file, weights.files.folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)

    generation = load_generation_config(weights.files.folder)
    generation.eos_token_id = end_token_ids(generation, tokenizer)
    if "pad_token" in weights.config.data.special_tokens:
        generation.pad_token_id = tokenizer.pad_token_id
    # transformers' own way to save refuses what many published models have: a temperature that they don't sample with.
    generation.to_json_file(folder / GENERATION_FILE, keys_to_pop=["compile_config"])


def _copy_tokenizer(adapter: Path, folder: Path) -> None:
    for path in adapter.iterdir():
        if path.is_dir():  # of chat templates, where there are several
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)  # an interrupted merge may have been here
        elif path.name not in ADAPTER_FILES:
            shutil.copyfile(path, folder / path.name)


def _set_vocab_size(config: dict[str, Any], size: int) -> None:
    """Says how many rows embedding and head have, where a config says it: of models with images in a part of it."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = text | {"vocab_size": size}
    if "vocab_size" in config or not isinstance(text, dict):
        config["vocab_size"] = size
