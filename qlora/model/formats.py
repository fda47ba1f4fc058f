"""Storage formats of a base's weights; unsupported ones are rejected before anything is loaded."""

from typing import Any

from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.files.base_files import unsupported_format
from qlora.files.stored import DTYPES, StoredTensors
from qlora.nf4 import QUANT_STATE

PLAIN = "16 or 32 bits"
BITSANDBYTES_4BIT = "bitsandbytes 4-bit"
# The supported formats, each with the class that reads its tensors and decodes a weight that is stored as several.
# bitsandbytes' codes are not decoded: `qlora.model.base_weights` returns them with their statistics.
READERS = {PLAIN: StoredTensors, BITSANDBYTES_4BIT: StoredTensors}
# Names of formats by their quant_method in config.json; another method keeps its own name.
METHODS = {"fp8": "FP8", "mxfp4": "MXFP4", "gptq": "GPTQ", "awq": "AWQ"}
# Formats by the ending of a tensor's name, for files whose config does not declare one.
ENDINGS = {
    ".SCB": "bitsandbytes 8-bit",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    "_proj_blocks": "MXFP4",
}


def weight_format(files: BaseFiles, quantization: str = "nf4") -> str:
    """Return the format of a base's weights, a key of `READERS`.

    config.json declares it; tensors are checked too if they are present, which `qlora estimate` does not need.

    Args:
        files: The base's files.
        quantization: How the weights will be loaded: `nf4` or `none`.

    Raises:
        ModelError: The format is not supported, config.json contradicts the tensors, or 4-bit weights are loaded
            without quantization.
    """
    declared = _declared_format(files)
    found = _formats_of_tensors(files) if files.has_weights else {declared}
    for stored_in in (declared, *sorted(found)):
        if stored_in not in READERS:
            raise unsupported_format(files.name, stored_in)
    if (declared == BITSANDBYTES_4BIT) != (BITSANDBYTES_4BIT in found):
        raise ModelError(
            f"{files.name}: config.json declares weights in {declared}, but the files hold "
            f"{' and '.join(sorted(found))}; correct its quantization_config, or use other files."
        )
    if quantization == "none" and declared == BITSANDBYTES_4BIT:
        raise ModelError(f"quantization: none is not possible for {files.name}, which is stored in 4 bits; use nf4.")
    return declared


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
        return "FP8" if dtype.startswith("F8_") else dtype
    return next((stored_in for ending, stored_in in ENDINGS.items() if name.endswith(ending)), PLAIN)
