"""A model's weights in bitsandbytes' 4-bit format, written as a folder that transformers and training load."""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.config.sections import parse_size
from qlora.errors import ExportError
from qlora.export.card import write_quantized_card
from qlora.export.names import names_in_files, transposed_modules
from qlora.files import BaseFiles, write_aside
from qlora.files.resumable import new_folder
from qlora.files.shards import ShardWriter, TensorLayout
from qlora.files.stored import StoredTensors
from qlora.model import build_skeleton, resolve_device
from qlora.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, is_bitsandbytes_linear, quantize

STATE = "quant_state.bitsandbytes__nf4"
# The text of a weight's state holds a number of any length; spaces after JSON mean nothing, and so its size is known
# before the weight is.
STATE_BYTES = 256
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
    "additional_chat_templates/*.jinja", "*.model", "generation_config.json", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What was written.

    Attributes:
        out_dir: The model folder.
        dtype: Of what is not quantized, and of the weights before they were.
        quantized: Layers in 4 bits.
        tensors: In the folder, statistics among them.
        num_bytes: Of its tensors.
        base_bytes: Of the tensors it was made from.
        seconds: Taken.
    """

    out_dir: str
    dtype: str
    quantized: int
    tensors: int
    num_bytes: int
    base_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


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
    """Quantizes the linear layers that `load_base` would to NF4, and writes them under bitsandbytes' names.

    Each tensor is read, quantized and written before the next is read.

    Args:
        base: A folder, or a model id on the hub.
        out_dir: A folder that is not there yet; written aside and renamed when whole.
        double_quant: Quantize the blocks' statistics too.
        dtype: `bfloat16`, `float16` or `float32`, which weights are cast to first and what is not quantized stays in;
            `auto` for the model's own. Loading it in another compute dtype than this is not bit-equal to quantizing
            the model while it is loaded.
        max_shard_size: Of a weight file.
        device: To quantize on: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        revision: Of a model on the hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ExportError: The folder exists, the model is quantized already, a value does not fit, the disk is full.
        ModelError: The model can't be found or its architecture is not known.
    """
    started = time.perf_counter()
    out_dir = new_folder(out_dir)
    files = BaseFiles.resolve(base, revision, trust_remote_code)
    if files.is_bitsandbytes_4bit or files.config.get("quantization_config"):
        raise ExportError(f"{base} is quantized already; quantize the 16-bit model it was made from.")
    target = _own_dtype(files) if dtype == "auto" else getattr(torch, dtype)
    settings = _settings(double_quant, target)
    is_transposed = _quantized_tensors(files, settings, trust_remote_code)
    layout = _layout(files, is_transposed, double_quant, target)
    stored = StoredTensors(files.headers)
    on = resolve_device(device)
    with write_aside(out_dir, ExportError) as folder:
        writer = ShardWriter(folder, layout, parse_size(max_shard_size))
        for name in files.tensors:
            value = stored.read(name)
            if value.is_floating_point():
                value = _cast(name, value.to(on), target)
            if name in is_transposed:
                _write_quantized(writer, name, value.T if is_transposed[name] else value, double_quant)
            else:
                writer.write(name, value)
        writer.close()
        _write_companions(folder, files, settings, target)
        rows = {
            "layers in 4 bits": len(is_transposed),
            "quantization": f"NF4 in blocks of {BLOCK_SIZE}, double quantization: {double_quant}",
            "all else, and compute": _name(target),
            "bytes": writer.num_bytes,
        }
        write_quantized_card(folder, out_dir.name, base, files.folder, rows)
    return QuantizeReport(
        str(out_dir),
        _name(target),
        len(is_transposed),
        len(layout),
        writer.num_bytes,
        sum(path.stat().st_size for path in files.weight_files),
        round(time.perf_counter() - started, 3),
    )


def _own_dtype(files: BaseFiles) -> torch.dtype:
    """What the config says, or else the first weight is in."""
    said = files.config.get("dtype") or files.config.get("torch_dtype")
    if isinstance(said, str) and said != "auto":
        dtype = getattr(torch, said.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ExportError(f"{files.name}: config.json names the dtype {said!r:.40}, which is none; give --dtype.")
        return dtype
    return StoredTensors(files.headers).dtype(next(iter(files.tensors)))


def _settings(double_quant: bool, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _quantized_tensors(files: BaseFiles, settings: Any, trust_remote_code: bool) -> dict[str, bool]:
    """Names in the files of the weights that transformers puts in 4 bits, and whether they are stored (in, out).

    Raises:
        ExportError: Some are not tensors of their own in the files.
    """
    from transformers.quantizers import AutoHfQuantizer

    skeleton = build_skeleton(files, trust_remote_code)
    single, _ = names_in_files(skeleton, files.tensors)
    transposed = transposed_modules(skeleton)
    AutoHfQuantizer.from_config(settings).preprocess_model(skeleton, device_map=None)
    modules = [name for name, module in skeleton.named_modules() if is_bitsandbytes_linear(module)]
    missing = [module for module in modules if f"{module}.weight" not in single]
    if missing:
        raise ExportError(
            f"{len(missing)} layers are no tensors of their own in the files of {files.name} "
            f"({', '.join(missing[:3])} …). Load the model with transformers, save it, and quantize that."
        )
    return {single[f"{module}.weight"]: module in transposed for module in modules}


def _layout(files: BaseFiles, quantized: dict[str, bool], double_quant: bool, dtype: torch.dtype) -> list[TensorLayout]:
    layout, stored = [], StoredTensors(files.headers)
    for name in files.tensors:
        shape, own = stored.shape(name), stored.dtype(name)
        if name in quantized:
            layout += _quantized_layout(name, math.prod(shape), double_quant)
        else:
            layout.append(TensorLayout(name, shape, dtype if own.is_floating_point else own))
    return layout


def _quantized_layout(name: str, numel: int, double_quant: bool) -> list[TensorLayout]:
    """A weight and its statistics as bitsandbytes' `QuantState.as_dict` names them, in their order of writing."""
    blocks = math.ceil(numel / BLOCK_SIZE)
    statistics: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "absmax": ((blocks,), torch.uint8 if double_quant else torch.float32),
        "quant_map": ((16,), torch.float32),
    }
    if double_quant:
        statistics["nested_absmax"] = ((math.ceil(blocks / NESTED_BLOCK_SIZE),), torch.float32)
        statistics["nested_quant_map"] = ((256,), torch.float32)
    statistics[STATE] = ((STATE_BYTES,), torch.uint8)
    packed = TensorLayout(name, (math.ceil(numel / 2), 1), torch.uint8)
    return [packed, *(TensorLayout(f"{name}.{key}", *value) for key, value in statistics.items())]


def _write_quantized(writer: ShardWriter, name: str, weight: torch.Tensor, double_quant: bool) -> None:
    packed, state = quantize(weight, double_quant, BLOCK_SIZE)
    tensors = {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    text = bytes(tensors[f"{name}.{STATE}"].tolist())
    assert len(text) <= STATE_BYTES, f"{name}: {text!r}"
    tensors[f"{name}.{STATE}"] = torch.tensor(list(text.ljust(STATE_BYTES)), dtype=torch.uint8)
    for entry in _quantized_layout(name, weight.numel(), double_quant):
        value = tensors.pop(entry.name)
        assert tuple(value.shape) == entry.shape, f"{entry.name}: {tuple(value.shape)} in place of {entry.shape}"
        writer.write(entry.name, value)
    assert not tensors, f"{name}: {', '.join(tensors)} would be lost"


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = value.to(dtype)
    if not cast.isfinite().all():
        raise ExportError(f"{name}: a value does not fit {_name(dtype)}; quantize with --dtype bfloat16.")
    return cast


def _write_companions(folder: Path, files: BaseFiles, settings: Any, dtype: torch.dtype) -> None:
    """Config, tokenizer, template and generation config, as they are beside the model."""
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
