"""An adapter as a GGUF file, which llama.cpp applies to a base that it has loaded."""

import json
import time
from pathlib import Path
from typing import Any

from qlora.checkpoint import PeftAdapter, adapter_digest
from qlora.errors import ExportError
from qlora.export.card import public_name
from qlora.export.companions import REPORT_FILE, MergeReport
from qlora.export.gguf.model import FAMILIES, HEAD, import_gguf, in_pairs, read_config
from qlora.export.gguf.modelfile import write_modelfile
from qlora.files import BaseFiles, atomic_folder
from qlora.files.resumable import new_folder
from qlora.lora.linear import StoredAdapter
from qlora.model import AdapterSource, end_token_ids, load_adapter_tokenizer, load_generation_config

FORMAT = "lora-gguf"
MERGE_INSTEAD = "Merge it: --format gguf."


def adapter_to_gguf(source: AdapterSource, out_dir: str | Path) -> MergeReport:
    """Write an adapter's factors in fp32 into a GGUF file, under llama.cpp's names; see :func:`qlora.merge`.

    llama.cpp scales each layer by alpha / rank with one alpha, so scalings that differ from that are written into B.

    Raises:
        ExportError: `gguf` is not installed, or llama.cpp would not compute what the adapter does.
    """
    started = time.perf_counter()
    gguf, out_dir = import_gguf(), new_folder(out_dir)
    digest, adapter, files = adapter_digest(source.folder), source.read(), source.base_files()
    config = read_config(files.folder)
    layers = {name: layer for name, layer in adapter.layers.items() if len(layer.A)}
    _check(source, adapter, files, config, layers)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == FAMILIES[config.model_type]),
        config.num_hidden_layers,
    )
    alpha = max(layer.scaling * len(layer.A) for layer in layers.values())
    with atomic_folder(out_dir, ExportError, 4 * sum(each.numel() for each in adapter.tensors.values())) as folder:
        out_file = folder / f"{out_dir.name}-lora.gguf"
        writer = gguf.GGUFWriter(out_file, FAMILIES[config.model_type])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(out_dir.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, layer in layers.items():
            own = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            if own is None:
                raise ExportError(f"{name} has no name in a GGUF file of {config.model_type}. {MERGE_INSTEAD}")
            factor = layer.scaling * len(layer.A) / alpha
            writer.add_tensor(f"{own}.lora_a", layer.A.float().contiguous().numpy())
            writer.add_tensor(f"{own}.lora_b", (in_pairs(layer.B.float(), own, config) * factor).contiguous().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        tokenizer = load_adapter_tokenizer(source)
        ends = end_token_ids(load_generation_config(files.folder), tokenizer)
        write_modelfile(out_file, tokenizer, ends, adapter_for=public_name(source.base)[0])
        report = MergeReport(
            out_dir=str(out_dir),
            run_dir=str(source.path),
            step=source.step,
            adapter=digest,
            dtype="float32",
            onto="original",
            losses=None,
            merged=len(layers),
            tensors=2 * len(layers),
            num_bytes=out_file.stat().st_size,
            continued_bytes=0,
            device="cpu",
            base_differs=source.base_differs(files),
            seconds=round(time.perf_counter() - started, 3),
            notes=_notes(source),
            format=FORMAT,
        )
        released = report.as_dict() | {"out_dir": out_dir.name, "run_dir": source.path.name}
        (folder / REPORT_FILE).write_text(json.dumps(released, indent=2) + "\n", encoding="utf-8")
    return report


def _check(
    source: AdapterSource, adapter: PeftAdapter, files: BaseFiles, config: Any, layers: dict[str, StoredAdapter]
) -> None:
    """Check that llama.cpp would compute what the adapter does.

    Raises:
        ExportError: It would not; the message says why.
    """
    is_text = json.loads((files.folder / "config.json").read_text(encoding="utf-8")).get("text_config") is None
    is_tied = config.tie_word_embeddings
    problems = {
        "it has no layer with a factor": not layers,
        "llama.cpp applies no rows of embedding and head trained in full": adapter.rows,
        "llama.cpp applies no magnitudes (DoRA)": any(layer.magnitude is not None for layer in layers.values()),
        "llama.cpp reads no factors of all experts of a layer": adapter.experts,
        "llama.cpp has no adapter of a head that is the embedding": is_tied and HEAD.removesuffix(".weight") in layers,
        "it is for the text part of a multimodal model": not is_text,
        "model.rope_scaling extends a context in the base's file, which an adapter does not change": files.rope_scaling,
        "lora.init: reconstruct fits a base of its own, not the published one": any(
            start.subtracted for start in source.starts().values()
        ),
    }
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise ExportError(f"{source.path} can't be an adapter of llama.cpp: {'; '.join(found)}. {MERGE_INSTEAD}")


def _notes(source: AdapterSource) -> list[str]:
    """Return what a user of the file should know about the base."""
    if source.run is None or source.run.read_record().quantization.kind == "none":
        return []
    return [
        "it was trained on the base in 4 bits (NF4); on another quantization, or none, its answers may differ a bit"
    ]
