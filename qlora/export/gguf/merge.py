"""Merge an adapter into one GGUF file, from the base's files and the adapter."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from qlora.checkpoint import adapter_digest
from qlora.dtypes import full_name
from qlora.errors import ExportError
from qlora.export.card import lost_in_4_bits
from qlora.export.companions import MergeReport, OnProgress, write_companions, write_report_and_card
from qlora.export.gguf.model import BLOCK_BYTES, BLOCK_SIZE, write_gguf
from qlora.export.gguf.modelfile import write_modelfile
from qlora.export.weights import MergedWeights
from qlora.files import atomic_folder
from qlora.files.resumable import new_folder
from qlora.model import AdapterSource, end_token_ids, load_generation_config, load_tokenizer

GGUF_DTYPES = {"float16": "f16", "bfloat16": "bf16"} | {name: name for name in BLOCK_BYTES}
FEW_BITS = (
    "written in {dtype} onto the dequantized base: every weight sits on a code centre of the first quantization and is "
    "rounded again to few bits, which loses much of the fine-tuning gain; for this type, merge --onto original"
)


def merge_to_gguf(
    source: AdapterSource,
    out_dir: str | Path,
    dtype: str,
    onto: str,
    device: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> MergeReport:
    """Merge an adapter into its base, and write a GGUF file, tokenizer and config; see :func:`qlora.merge`.

    Each tensor is merged in fp32 and written before the next is read.
    """
    started = time.perf_counter()
    out_dir, dtype = new_folder(out_dir), full_name(dtype)
    if dtype not in GGUF_DTYPES or onto == "best":
        raise ExportError(
            f"GGUF can't be written in {dtype} onto {onto}; use one of {', '.join(GGUF_DTYPES)}, onto dequantized or "
            "original."
        )
    step, adapter = source.step, adapter_digest(source.folder)  # before the weights, as in merge
    weights = MergedWeights(source, onto, device, force)
    # Of a multimodal model, the file has the text part.
    names = weights.names_as_text
    layout = [replace(entry, name=names[entry.name]) for entry in weights.layout(torch.float32) if entry.name in names]
    stored = {name: own for own, name in names.items()}
    remaining = {entry.name: entry.num_bytes for entry in layout}
    total = sum(remaining.values())

    def read(name: str) -> torch.Tensor:
        value = weights.tensor(stored[name]).cpu()
        remaining.pop(name, None)  # the embedding and head of a tied model may be read twice
        if on_progress is not None:
            on_progress(total - sum(remaining.values()), total)
        return value

    is_blocks = dtype in BLOCK_BYTES
    # At most: norms stay in fp32, but are small.
    needed = total * BLOCK_BYTES["q8_0"] // (4 * BLOCK_SIZE) if is_blocks else total // 2
    with atomic_folder(out_dir, ExportError, needed) as folder:
        write_companions(folder, weights, "float16" if is_blocks else dtype)
        out_file = folder / f"{out_dir.name}-{GGUF_DTYPES[dtype]}.gguf"
        written = write_gguf(folder, layout, read, out_file, dtype=GGUF_DTYPES[dtype], name=out_dir.name)
        tokenizer = load_tokenizer(folder)
        write_modelfile(out_file, tokenizer, end_token_ids(load_generation_config(folder), tokenizer))
        report = MergeReport(
            out_dir=str(out_dir),
            run_dir=str(source.path),
            step=step,
            adapter=adapter,
            dtype=dtype,
            onto=onto,
            losses=None,
            merged=weights.num_adapted,
            tensors=written.tensors,
            num_bytes=written.num_bytes,
            continued_bytes=0,
            device=weights.device.type,
            base_differs=weights.base_differs,
            seconds=round(time.perf_counter() - started, 3),
            notes=weights.notes + written.notes + _notes_on_bits(dtype, onto),
            format="gguf",
        )
        write_report_and_card(folder, report, source, weights.files.folder)
    return report


def _notes_on_bits(dtype: str, onto: str) -> list[str]:
    """Return what rounding to fewer bits, now or later, does to the fine-tuning; empty if it does little."""
    if dtype in ("q4_0", "q5_0"):
        return [FEW_BITS.format(dtype=dtype)] if onto == "dequantized" else []
    return [] if dtype == "q8_0" else lost_in_4_bits(onto)
