"""Safetensors shards written tensor by tensor, so that no shard is ever held in memory."""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class ShardWriter:
    """Writes tensors in a layout known beforehand, into as many files as the limit asks for.

    The format is a length, a JSON header and the tensors' bytes (github.com/huggingface/safetensors); its own
    library writes a file only from tensors that are all in memory.

    Args:
        folder: For the files and, if there are several, their index.
        layout: Names and shapes, in the order in which they will be written.
        dtype: Of all tensors.
        max_bytes: Of tensors per file; one that is larger has a file to itself.
    """

    def __init__(
        self, folder: Path, layout: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype, max_bytes: int
    ) -> None:
        self.folder, self.dtype = folder, dtype
        self._shards = self._split(layout, max_bytes)
        self._order = iter([(name, shard) for shard, part in enumerate(self._shards) for name, _ in part])
        self._file: BinaryIO | None = None
        self._current = -1
        self.num_bytes = sum(self._num_bytes(shape) for _, shape in layout)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor of the layout."""
        expected, shard = next(self._order)
        assert name == expected, f"{name} came where the layout has {expected}"
        assert tensor.dtype == self.dtype, f"{name} is {tensor.dtype}"
        if shard != self._current:
            self._open(shard)
        assert self._file is not None
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Ends the last file and writes the index."""
        if self._file is not None:
            self._file.close()
        if len(self._shards) > 1:
            weight_map = {name: self._name(shard) for shard, part in enumerate(self._shards) for name, _ in part}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _open(self, shard: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in self._shards[shard]:
            end = offset + self._num_bytes(shape)
            header[name] = {"dtype": DTYPE_NAMES[self.dtype], "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self.folder / self._name(shard)).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._current = shard

    def _split(
        self, layout: Sequence[tuple[str, tuple[int, ...]]], max_bytes: int
    ) -> list[list[tuple[str, tuple[int, ...]]]]:
        shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
        size = 0
        for name, shape in layout:
            num_bytes = self._num_bytes(shape)
            if shards[-1] and size + num_bytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, shape))
            size += num_bytes
        return shards

    def _num_bytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) * self.dtype.itemsize

    def _name(self, shard: int) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"
