"""Quantize a model into a folder in bitsandbytes' 4-bit format, which transformers and training load."""

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.checkpoint import RunDirectory
from qlora.config.sections import parse_size
from qlora.dtypes import as_dtype
from qlora.errors import ExportError, ModelError
from qlora.export.card import lost_in_4_bits, write_quantized_card
from qlora.export.companions import REPORT_FILE
from qlora.files import BaseFiles, atomic_folder
from qlora.files.json_files import read_object
from qlora.files.resumable import new_folder
from qlora.files.shards import ShardWriter, TensorLayout
from qlora.lora import stored_head
from qlora.lora.mixture import expert_stacks
from qlora.model import (
    BITSANDBYTES_4BIT,
    BaseWeights,
    Starts,
    build_skeleton,
    has_codes,
    open_source,
    resolve_device,
    subtracted,
    weight_format,
)
from qlora.model.quantization import QuantizedLayer, find_quantized_layers, settings_of_base
from qlora.model.shares import check_share
from qlora.nf4 import BLOCK_SIZE, checkpoint_layout, quantize, to_checkpoint_tensors

COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
    "additional_chat_templates/*.jinja", "*.model", "generation_config.json", "*processor_config.json",
    "chat_template.json", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, repr=False)
class QuantizeReport:
    """The result of :func:`quantize_model`.

    Attributes:
        out_dir: The model folder.
        dtype: Dtype of the tensors that are not quantized, and of the other weights before quantization.
        quantized: Number of layers in 4 bits.
        tensors: Number of tensors in the folder, including statistics.
        num_bytes: Bytes of these tensors.
        base_bytes: Bytes of the original weight files.
        seconds: Duration in seconds.
        notes: What the 4-bit model loses.
    """

    out_dir: str
    dtype: str
    quantized: int
    tensors: int
    num_bytes: int
    base_bytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<QuantizeReport: {self.quantized} layers in 4 bits, {self.out_dir}>"


def quantize_model(
    base: str,
    out_dir: str | Path,
    double_quant: bool = True,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> QuantizeReport:
    """Quantize the linear layers that `load_base` quantizes, and write them under bitsandbytes' names.

    Each tensor is read, quantized and written before the next is read.

    For a run, write the base that the run trains on. With `lora.init: reconstruct` its adapter fits no other: that base
    lacks the term that the initial values make up for.

    Args:
        base: A folder, a GGUF file, or a model id on the hub, in 16 or 32 bits or a format that is decoded; or a run,
            whose settings are then used.
        out_dir: A new folder; it appears once everything in it is written.
        double_quant: Quantize the blocks' statistics too.
        dtype: `bfloat16`, `float16` or `float32`: weights are cast to it before they are quantized, and the other
            tensors stay in it; `auto` for the model's own. Loading the result in another compute dtype is not
            bit-equal to quantizing the model while it is loaded.
        max_shard_size: Largest size of a weight file, such as `5GB`.
        device: Device to quantize on: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        revision: Revision of a model on the hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ExportError: The folder exists, the model is quantized already, a value does not fit the dtype, or the disk is
            full.
        ModelError: The model can't be found or read, its architecture is unknown, or a layer is not one tensor in its
            files.
    """
    started = time.perf_counter()
    try:
        max_bytes = parse_size(max_shard_size)
    except (ValueError, TypeError):
        raise ExportError(f"max_shard_size: {max_shard_size!r} should be a size such as 5GB or 500MB.") from None
    out_dir = new_folder(out_dir)
    starts: Starts = {}
    keep_16bit: Sequence[str] = ()
    run, trained_on, source = base, None, None
    if RunDirectory.find(base) is not None:
        source = open_source(base)
        if not source.quantized(source.base_files()):
            raise ExportError(f"{base} is a run on a base in 16 bits; quantize its merge instead.")
        if differing := source.base_differs(source.base_files()):
            raise ExportError(f"{source.base} is not the base used in training: {', '.join(differing)} differ.")
        trained_on = source.trained_on
        if dtype != "auto" or not double_quant or revision is not None:
            raise ExportError(f"{base} is a run, whose dtype, double quantization and revision are used; omit yours.")
        base, revision, trust_remote_code = source.base, source.revision, source.trust_remote_code
        double_quant, starts, keep_16bit = source.double_quant, source.starts(), source.keep_16bit
        dtype = _name(source.compute_dtype(resolve_device(device)))
    files = source.base_files() if source is not None else BaseFiles.resolve(base, revision, trust_remote_code)
    if weight_format(files) == BITSANDBYTES_4BIT:
        raise ExportError(f"{base} is quantized already; quantize the 16-bit model it was made from.")
    notes = _notes(files.folder)
    weights = BaseWeights(files)
    target = _own_dtype(files, weights) if dtype == "auto" else as_dtype(dtype, ExportError)
    skeleton = build_skeleton(files, trust_remote_code, stored_head(files.config))
    settings = settings_of_base(files, skeleton, "nf4", double_quant, target, keep_16bit)
    layers = find_quantized_layers(skeleton, settings, base, weights.shapes)
    if experts := expert_stacks(skeleton):
        numel = sum(stack.numel for stack in experts.values())
        notes.append(
            f"{numel:,} weights of experts stay in {_name(target)}, because bitsandbytes has no format for them in 4 "
            "bits; qlora quantizes them when it loads the folder"
        )
    try:
        check_share(base, skeleton, settings)
    except ModelError as error:
        notes.append(f"qlora train refuses the folder, as it does the base: {error}")
    _check_classes(skeleton, layers, base)
    layout = _layout(weights, layers, double_quant, target)
    on = resolve_device(device)
    with atomic_folder(out_dir, ExportError) as folder:
        writer = ShardWriter(folder, layout, max_bytes)
        for name in weights.shapes:
            value = weights.read(name).to(on)
            if name in layers:
                layer = layers[name]
                weight = subtracted(value.T if layer.is_transposed else value, starts.get(layer.name))
                packed, state = quantize(_cast(name, weight, target), double_quant)
                if layer.name in starts and not has_codes(starts[layer.name], packed):
                    _differs(f"{name} has other 4-bit codes than in {run}", on.type, trained_on, notes)
                _write_quantized(writer, name, packed, state)
            else:
                writer.write(name, _cast(name, value, target) if value.is_floating_point() else value)
        writer.close()
        _write_companions(folder, files, settings, target)
        rows = {
            "layers in 4 bits": len(layers),
            "quantization": f"NF4 in blocks of {BLOCK_SIZE}, double quantization: {double_quant}",
            "other tensors and compute": _name(target),
            "bytes": writer.num_bytes,
            **({"notes": "; ".join(notes)} if notes else {}),
        }
        write_quantized_card(folder, out_dir.name, base, files.folder, rows, stored_head(files.config))
    return QuantizeReport(
        out_dir=str(out_dir),
        dtype=_name(target),
        quantized=len(layers),
        tensors=len(layout),
        num_bytes=writer.num_bytes,
        base_bytes=sum(path.stat().st_size for path in files.weight_files),
        seconds=round(time.perf_counter() - started, 3),
        notes=notes,
    )


def _check_classes(skeleton: Any, layers: Mapping[str, QuantizedLayer], base: str) -> None:
    """Check that transformers, which reads the result, knows every quantized layer as one.

    Raises:
        ExportError: It does not: only qlora quantizes subclasses of `nn.Linear`.
    """
    modules = (skeleton.get_submodule(layer.name) for layer in layers.values())
    subclasses = (type(module) for module in modules if isinstance(module, nn.Linear))
    others = {each.__name__ for each in subclasses if each is not nn.Linear}
    if others:
        raise ExportError(
            f"{base} has layers of the class {', '.join(sorted(others))}, which transformers does not load in 4 bits; "
            "use the 16-bit model, which training quantizes as it loads it."
        )


def _differs(message: str, device: str, trained_on: str | None, notes: list[str]) -> None:
    """Raise an error about codes that differ from a run's; a note where another kind of device explains it."""
    if device == trained_on:
        raise ExportError(f"{message}; restore the base that it was trained on.")
    note = f"quantized on {device}, but the run was trained on {trained_on}: --device {trained_on} gives its codes"
    if note not in notes:
        notes.append(note)


def _notes(folder: Path) -> list[str]:
    """Return a warning if a model was merged onto weights that were quantized already."""
    path = folder / REPORT_FILE
    report = read_object(path, ExportError, "merge again") if path.is_file() else {}
    return lost_in_4_bits(str(report.get("onto")))


def _own_dtype(files: BaseFiles, weights: BaseWeights) -> torch.dtype:
    """Return the dtype that the config names, or else that of the first floating-point tensor.

    Raises:
        ExportError: The config names another one than bfloat16, float16 and float32, or no tensor has one of them.
    """
    named = files.config.get("dtype") or files.config.get("torch_dtype")
    if isinstance(named, str) and named != "auto":
        dtype = getattr(torch, named.removeprefix("torch."), None)
        if dtype not in DTYPES:
            raise ExportError(
                f"{files.name}: config.json names the dtype {named!r:.40}, which is not available; give --dtype."
            )
        return dtype
    dtypes = (weights.dtype(name) for name in weights.shapes)
    dtype = next((dtype for dtype in dtypes if dtype in DTYPES), None)
    if dtype is None:
        raise ExportError(f"{files.name} has no tensor in bfloat16, float16 or float32; give --dtype.")
    return dtype


def _layout(
    weights: BaseWeights, layers: dict[str, QuantizedLayer], double_quant: bool, dtype: torch.dtype
) -> list[TensorLayout]:
    layout = []
    for name, shape in weights.shapes.items():
        if name in layers:
            layout += _quantized_layout(name, math.prod(shape), double_quant)
        else:
            layout.append(TensorLayout(name, shape, dtype if weights.is_floating_point(name) else weights.dtype(name)))
    return layout


def _quantized_layout(name: str, numel: int, double_quant: bool) -> list[TensorLayout]:
    return [TensorLayout(key, *entry) for key, entry in checkpoint_layout(name, numel, double_quant).items()]


def _write_quantized(writer: ShardWriter, name: str, packed: torch.Tensor, state: Any) -> None:
    tensors = to_checkpoint_tensors(name, packed, state)
    for entry in _quantized_layout(name, state.shape.numel(), state.nested):
        tensor = tensors.pop(entry.name)
        assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)} instead of {entry.shape}"
        writer.write(entry.name, tensor)
    assert not tensors, f"{name}: {', '.join(tensors)} would be lost"


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a tensor, or raise an ExportError if a value does not fit the dtype."""
    cast = value.to(dtype)
    if not cast.isfinite().all():
        raise ExportError(f"{name}: a value does not fit {_name(dtype)}; quantize with --dtype bfloat16.")
    return cast


def _write_companions(folder: Path, files: BaseFiles, settings: Any, dtype: torch.dtype) -> None:
    """Write the config, and copy tokenizer, templates, generation config and licence of the base."""
    config = {key: value for key, value in files.config.items() if key not in ("dtype", "torch_dtype")}
    config |= {"dtype": _name(dtype), "quantization_config": settings.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in COPIED:
        for path in filter(Path.is_file, files.folder.glob(pattern)):
            target = folder / path.relative_to(files.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
