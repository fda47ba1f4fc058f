"""Safetensors shards written tensor by tensor, so that no shard is ever held in memory."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

DTYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes tensors in a layout known beforehand, into as many files as the limit asks for.

    The format is a length, a JSON header and the tensors' bytes (github.com/huggingface/safetensors); its own
    library writes a file only from tensors that are all in memory.

    Args:
        folder: For the files and, if there are several, their index.
        layout: The tensors, in the order in which they will be written.
        max_bytes: Of tensors per file; one that is larger has a file to itself.
    """

    def __init__(self, folder: Path, layout: Sequence[TensorLayout], max_bytes: int) -> None:
        self.folder = folder
        self.num_bytes = sum(tensor.num_bytes for tensor in layout)
        self._shards = _split(layout, max_bytes)
        self._order = iter([(tensor, shard) for shard, part in enumerate(self._shards) for tensor in part])
        self._file: BinaryIO | None = None
        self._current = -1

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor of the layout."""
        expected, shard = next(self._order)
        assert (name, tensor.dtype) == (expected.name, expected.dtype), (
            f"{name} in {tensor.dtype} came in place of {expected}"
        )
        if shard != self._current:
            self._open(shard)
        assert self._file is not None
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Ends the last file and writes the index."""
        if self._file is not None:
            self._file.close()
        if len(self._shards) > 1:
            weight_map = {tensor.name: self._name(shard) for shard, part in enumerate(self._shards) for tensor in part}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _open(self, shard: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self._shards[shard]:
            end = offset + tensor.num_bytes
            dtype = DTYPE_NAMES[tensor.dtype]
            header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self.folder / self._name(shard)).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._current = shard

    def _name(self, shard: int) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"


def _split(layout: Sequence[TensorLayout], max_bytes: int) -> list[list[TensorLayout]]:
    shards: list[list[TensorLayout]] = [[]]
    size = 0
    for tensor in layout:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards
