"""The header of a safetensors file, checked before its tensors are read or memory is allocated for them."""

from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlora.errors import ModelError
from qlora.files.json_files import MAX_BYTES, parse_object

# Format: github.com/huggingface/safetensors. torch supports as many dimensions.
MAX_DIMENSIONS = 64
# Size of a dimension of a tensor without values that is always allowed.
LARGEST_OF_NONE = 1 << 20
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


def read_header(path: Path) -> dict[str, Any]:
    """Read dtype, shape and offsets of every tensor in a safetensors file, by name.

    Raises:
        ModelError: The file is truncated, is not a safetensors file, or its header contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ModelError(f"{path} is not a safetensors file, or truncated at {size} bytes; download it again.")
        content = file.read(min(length, MAX_BYTES + 1))
    try:
        header = parse_object(content)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not strings by name")
        end = _check_places(header, size)
        if size == 8 + length + end:
            with safe_open(path, framework="pt"):  # it parses JSON more strictly, and does not read values here
                pass
    except (ValueError, TypeError, KeyError, SafetensorError) as problem:
        raise ModelError(f"{path} has a damaged header; download it again ({problem}).") from None
    if size != 8 + length + end:
        raise ModelError(f"{path} has {size} bytes, its header describes {8 + length + end}; download it again.")
    return header


def _check_places(header: dict[str, Any], size: int) -> int:
    """Check that tensors follow each other without gap or overlap, each as long as its shape and dtype require.

    A tensor without values may have any other sizes, up to what a file of this size could hold.

    Returns:
        The offset where the last tensor ends.

    Raises:
        ValueError: They do not. A header without these entries may also raise `TypeError` or `KeyError`.
    """
    end, largest = 0, max(8 * size, LARGEST_OF_NONE)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, dtype, (first, last) = entry["shape"], entry["dtype"], entry["data_offsets"]
        if dtype not in DTYPE_BITS:
            raise ValueError(f"{name} is in the unknown dtype {dtype!r:.40}")
        if not all(type(number) is int and 0 <= number <= largest for number in (*shape, first, last)):
            raise ValueError(f"{name} has impossible sizes")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{name} has {len(shape)} dimensions")
        if first != end or 8 * (last - first) != prod(shape) * DTYPE_BITS[dtype]:
            raise ValueError(f"{name} lies at {first} to {last}, which its shape, dtype or neighbours contradict")
        end = last
    return end
