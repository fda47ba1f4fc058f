"""Safetensors shards written tensor by tensor, so that no shard has to fit in memory."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    """Name, shape and dtype of a tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes tensors in a layout known in advance, split into files of limited size.

    The format is a length, a JSON header and the tensors' bytes (github.com/huggingface/safetensors); its own
    library writes a file only from tensors that are all in memory.

    It resumes what an interrupted writer of the same layout left in the folder: complete files, recognized by header
    and size, and the complete tensors of the first incomplete file.

    Args:
        folder: Folder for the files and, if there are several, their index.
        layout: The tensors, in the order in which they will be written.
        max_bytes: Largest number of bytes of tensors per file; a larger tensor gets a file of its own.

    Attributes:
        num_bytes: Bytes of all tensors.
        remaining: The tensors that are still to be written, in order.
    """

    def __init__(self, folder: Path, layout: Sequence[TensorLayout], max_bytes: int) -> None:
        self.folder = folder
        self.num_bytes = sum(tensor.num_bytes for tensor in layout)
        self._shards = _split(layout, max_bytes)
        self._headers = [_header(part) for part in self._shards]
        self._shard_of = {tensor.name: shard for shard, part in enumerate(self._shards) for tensor in part}
        self._file: BinaryIO | None = None
        self._current = -1
        self.remaining = list(layout[self._num_written() :])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor of the layout."""
        self.write_blocks(name, [tensor])

    def write_blocks(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Write the next tensor of the layout from blocks of its rows, in order."""
        expected = self.remaining[0]
        assert name == expected.name, f"{name} instead of {expected}"
        if self._shard_of[name] != self._current:
            self._open(self._shard_of[name])
        assert self._file is not None
        num_bytes = 0
        for block in blocks:
            assert block.dtype == expected.dtype, f"{name} in {block.dtype} instead of {expected}"
            num_bytes += self._file.write(block.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        assert num_bytes == expected.num_bytes, f"{num_bytes} bytes for {expected}"
        del self.remaining[0]

    def close(self) -> None:
        """Finish the last file and write the index."""
        self._end()
        if len(self._shards) > 1:
            weight_map = {name: self._name(shard) for name, shard in self._shard_of.items()}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _open(self, shard: int) -> None:
        """Start a file, or continue one after the tensors that it holds."""
        self._end()
        path, header = self.folder / self._name(shard), self._headers[shard]
        num_written = self._num_whole(shard)
        self._file = path.open("r+b" if num_written else "wb")
        self._current = shard
        if not num_written:
            self._file.write(header)
        self._file.truncate(len(header) + sum(tensor.num_bytes for tensor in self._shards[shard][:num_written]))
        self._file.seek(0, os.SEEK_END)

    def _end(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())  # so that it stays complete if writing the next one is interrupted
            self._file.close()
            self._file = None

    def _num_written(self) -> int:
        """Return the number of tensors in the folder, up to the first that is missing."""
        count = 0
        for shard, part in enumerate(self._shards):
            num_whole = self._num_whole(shard)
            count += num_whole
            if num_whole < len(part):
                break
        return count

    def _num_whole(self, shard: int) -> int:
        """Return the number of tensors that a file holds completely; 0 if it has another layout."""
        path, header = self.folder / self._name(shard), self._headers[shard]
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return 0
        ends = accumulate(tensor.num_bytes for tensor in self._shards[shard])
        size = path.stat().st_size - len(header)
        return sum(end <= size for end in ends)

    def _name(self, shard: int) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"


def _header(part: Sequence[TensorLayout]) -> bytes:
    """Return the start of a file: its header's length, and the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in part:
        end = offset + tensor.num_bytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
