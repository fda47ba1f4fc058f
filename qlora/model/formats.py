"""Storage formats of a base's weights; unsupported ones are rejected before anything is loaded."""

from collections.abc import Callable
from typing import Any

from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.files.base_files import unsupported_format
from qlora.files.fp8 import ACTIVATION_ENDINGS, DEFAULT_BLOCK, fp8_tensors
from qlora.files.mxfp4 import BLOCKS, mxfp4_tensors
from qlora.files.stored import DTYPES, FP8_DTYPES, StoredTensors, TensorReader
from qlora.model.gguf_names import open_gguf
from qlora.nf4 import MXFP4 as MXFP4_CODES
from qlora.nf4 import NF4, QUANT_STATE

PLAIN = "16 or 32 bits"
BITSANDBYTES_4BIT = "bitsandbytes 4-bit"
FP8 = "FP8"
MXFP4 = "MXFP4"
GGUF = "GGUF"


def _open_plain(files: BaseFiles) -> TensorReader:
    return StoredTensors(files.headers)


def _open_fp8(files: BaseFiles) -> TensorReader:
    block = files.config["quantization_config"].get("weight_block_size") or DEFAULT_BLOCK
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise ModelError(f"{files.name}: config.json has weight_block_size: {block!r:.40}, not two sizes; correct it.")
    return fp8_tensors(files.headers, (block[0], block[1]), files.name)


def _open_mxfp4(files: BaseFiles) -> TensorReader:
    return mxfp4_tensors(files.headers, files.name)


# The supported formats, each with the function that opens a reader of its tensors, which decodes what it reads.
# bitsandbytes' codes are not decoded: `qlora.model.base_weights` returns them with their statistics.
READERS: dict[str, Callable[[BaseFiles], TensorReader]] = {
    PLAIN: _open_plain,
    BITSANDBYTES_4BIT: _open_plain,
    FP8: _open_fp8,
    MXFP4: _open_mxfp4,
    GGUF: open_gguf,
}
# Names of formats by their quant_method in config.json; another method keeps its own name.
METHODS = {"fp8": FP8, "fbgemm_fp8": FP8, "mxfp4": MXFP4, "gptq": "GPTQ", "awq": "AWQ"}
# Formats by the ending of a tensor's name, for files whose config does not declare one.
ENDINGS = {
    ".SCB": "bitsandbytes 8-bit",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
}


def weight_format(files: BaseFiles, quantization: str = "nf4") -> str:
    """Return the format of a base's weights, a key of `READERS`.

    config.json declares it; tensors are checked too if they are present, which `qlora estimate` does not need.

    Args:
        files: The base's files.
        quantization: How the weights will be loaded: `nf4` or `none`.

    Raises:
        ModelError: The format is not supported, config.json contradicts the tensors, or weights in bitsandbytes' 4 bits
            are loaded without quantization.
    """
    if files.gguf is not None:
        return GGUF
    declared = _declared_format(files)
    found = _formats_of_tensors(files) if files.has_weights else {declared}
    for stored_in in (declared, *sorted(found)):
        if stored_in not in READERS:
            raise unsupported_format(files.name, stored_in)
    if {declared} - {PLAIN} != found - {PLAIN}:
        raise ModelError(
            f"{files.name}: config.json declares weights in {declared}, but the files hold "
            f"{' and '.join(sorted(found))}; correct its quantization_config, or use other files."
        )
    if quantization == "none" and declared == BITSANDBYTES_4BIT:
        raise ModelError(f"quantization: none is not possible for {files.name}, which is stored in 4 bits; use nf4.")
    return declared


def expert_type(files: BaseFiles) -> str:
    """Return the type of the codes that a base's experts have in 4 bits: MXFP4 if they are stored in it, else NF4."""
    return MXFP4_CODES if weight_format(files) == MXFP4 else NF4


def notes_on_format(files: BaseFiles, quantization: str = "nf4") -> list[str]:
    """Return what a user should know about how a base's weights are stored; empty for 16 or 32 bits.

    Args:
        files: The base's files.
        quantization: How the weights are loaded: `nf4` or `none`.
    """
    stored_in = weight_format(files, quantization)
    if stored_in in (PLAIN, BITSANDBYTES_4BIT):
        return []
    if stored_in == MXFP4 and quantization == "nf4":
        return [f"The experts of {files.name} keep the values that they are stored with in MXFP4; the rest is in NF4."]
    left_out = sum(name.endswith(ACTIVATION_ENDINGS) for name in files.tensors) if stored_in == FP8 else 0
    scales = f"; its {left_out} scales of activations are left out, as products are not in FP8" if left_out else ""
    return [f"The weights of {files.name} are decoded from {stored_in} as they are read{scales}."]


def _declared_format(files: BaseFiles) -> str:
    settings: Any = files.config.get("quantization_config")
    if not settings:
        return PLAIN
    if not isinstance(settings, dict):
        raise ModelError(
            f"{files.name}: config.json has quantization_config: {settings!r:.80}, which is not an object; "
            "download it again."
        )
    in_4bit, in_8bit = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    method = settings.get("quant_method") or ("bitsandbytes" if in_4bit or in_8bit else None)
    if method == "bitsandbytes":
        return BITSANDBYTES_4BIT if in_4bit else "bitsandbytes 8-bit"
    return METHODS.get(str(method), str(method)[:80])


def _formats_of_tensors(files: BaseFiles) -> set[str]:
    return {
        _format_of_tensor(name, entry["dtype"]) for header in files.headers.values() for name, entry in header.items()
    }


def _format_of_tensor(name: str, dtype: str) -> str:
    if QUANT_STATE in name:
        return BITSANDBYTES_4BIT
    if dtype not in DTYPES:
        return FP8 if dtype in FP8_DTYPES else dtype
    if name.endswith(BLOCKS) and dtype == "U8":
        return MXFP4
    return next((stored_in for ending, stored_in in ENDINGS.items() if name.endswith(ending)), PLAIN)
