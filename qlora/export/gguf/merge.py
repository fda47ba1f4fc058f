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
from qlora.export.gguf.k_quants import BITS, K_QUANTS, find_quantizer, quantize
from qlora.export.gguf.model import BLOCK_BYTES, BLOCK_SIZE, write_gguf
from qlora.export.gguf.modelfile import write_modelfile
from qlora.export.rounding import UpdateRounding
from qlora.export.weights import MergedWeights
from qlora.files import atomic_folder
from qlora.files.resumable import new_folder
from qlora.model import AdapterSource, end_token_ids, load_generation_config, load_tokenizer

GGUF_DTYPES = {"float16": "f16", "bfloat16": "bf16"} | {name: name for name in (*BLOCK_BYTES, *K_QUANTS)}
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

    Each tensor is merged in fp32 and written before the next is read. K-quants are made of a file in fp16 in the folder
    that is being written.
    """
    started = time.perf_counter()
    out_dir, dtype = new_folder(out_dir), full_name(dtype)
    if dtype not in GGUF_DTYPES or onto == "best":
        raise ExportError(
            f"GGUF can't be written in {dtype} onto {onto}; use one of {', '.join(GGUF_DTYPES)}, onto dequantized or "
            "original."
        )
    quantizer = find_quantizer(dtype) if dtype in K_QUANTS else None
    step, adapter = source.step, adapter_digest(source.folder)  # before the weights, as in merge
    weights = MergedWeights(source, onto, device, force)
    # Of a multimodal model, the file has the text part.
    names = weights.names_as_text
    layout = [replace(entry, name=names[entry.name]) for entry in weights.layout(torch.float32) if entry.name in names]
    stored = {name: own for own, name in names.items()}
    remaining = {entry.name: entry.num_bytes for entry in layout}
    total = sum(remaining.values())

    rounding = UpdateRounding(torch.bfloat16)
    # Only bf16 is measured, because GGUF has no type with finer steps than fp16 for matrices.
    on_base = rounding.keep if dtype == "bfloat16" else None

    def read(name: str) -> torch.Tensor:
        value = rounding.counted(weights.tensor(stored[name], on_base)).cpu()
        remaining.pop(name, None)  # the embedding and head of a tied model may be read twice
        if on_progress is not None:
            on_progress(total - sum(remaining.values()), total)
        return value

    is_16bit = dtype in ("float16", "bfloat16")
    # At most: norms stay in fp32, but are small.
    needed = total // 2 if is_16bit else total * BLOCK_BYTES["q8_0"] // (4 * BLOCK_SIZE)
    if quantizer is not None:
        needed = total // 2 + total * BITS // 32
    with atomic_folder(out_dir, ExportError, needed) as folder:
        write_companions(folder, weights, dtype if is_16bit else "float16")
        out_file = folder / f"{out_dir.name}-{GGUF_DTYPES[dtype]}.gguf"
        if quantizer is None:
            written = write_gguf(folder, layout, read, out_file, dtype=GGUF_DTYPES[dtype], name=out_dir.name)
        else:
            plain = out_file.with_name("plain-f16.gguf")
            written = write_gguf(folder, layout, read, plain, name=out_dir.name)
            notes = quantize(plain, out_file, dtype, quantizer)
            plain.unlink()
            written = replace(written, num_bytes=out_file.stat().st_size, notes=written.notes + notes)
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
            notes=weights.notes + rounding.notes + written.notes + _notes_on_bits(dtype, onto),
            format="gguf",
        )
        write_report_and_card(folder, report, source, weights.files.folder)
    return report


def _notes_on_bits(dtype: str, onto: str) -> list[str]:
    """Return what rounding to fewer bits, now or later, does to the fine-tuning; empty if it does little."""
    if dtype in (*BLOCK_BYTES, *K_QUANTS) and dtype not in ("q8_0", "q6_k"):
        return [FEW_BITS.format(dtype=dtype)] if onto == "dequantized" else []
    return [] if dtype in ("q8_0", "q6_k") else lost_in_4_bits(onto)
