"""Tensors of safetensors files, read from the disk by rows."""

import os
from collections.abc import Iterator, Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from qlora.errors import ExportError
from qlora.files.shards import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Numbers per block of rows: as fp32 they and an update of the same size stay in a core's cache, and malloc keeps their
# memory for the next block. Half or twice as many took longer.
BLOCK_NUMEL = 1 << 17


class StoredTensors:
    """Tensors by name, read when asked for and from their rows alone.

    safetensors' own slices map the file, whose pages then count as this process's memory, or read the whole tensor.

    Args:
        headers: What each file says of its tensors, as :func:`qlora.files.headers.read_header` gives it.
    """

    def __init__(self, headers: Mapping[Path, Mapping[str, Any]]) -> None:
        self._entries = {name: (path, entry) for path, header in headers.items() for name, entry in header.items()}
        self._path: Path | None = None
        self._file: FileIO | None = None
        self._start = 0

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._entries[name][1]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor.

        Raises:
            ExportError: It is one that is not read here.
        """
        path, entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise ExportError(
                f"{path}: {name} is in {entry['dtype']}; read are {', '.join(DTYPES)} and bitsandbytes' 4 bits."
            )
        return DTYPES[entry["dtype"]]

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Reads a tensor, or some of its rows (along its first dimension).

        Raises:
            ExportError: The file ends before the tensor does.
        """
        shape = self.shape(name)
        first = 0
        if shape:
            first, last, _ = rows.indices(shape[0])
            shape = (last - first, *shape[1:])
        values = torch.empty(shape, dtype=self.dtype(name))
        buffer = values.view(-1).view(torch.uint8).numpy().data
        file = self._open(self._entries[name][0])
        offset = self._entries[name][1]["data_offsets"][0] + first * prod(shape[1:]) * values.itemsize
        file.seek(self._start + offset)
        while buffer:  # one read gives 2 GiB at most
            count = file.readinto(buffer)
            if not count:
                raise ExportError(f"{self._path} ends within {name}; it was changed meanwhile.")
            buffer = buffer[count:]
        return values

    def _open(self, path: Path) -> FileIO:
        """The file, kept open until another is asked for: tensors are mostly read in their order."""
        if self._file is None or path != self._path:
            if self._file is not None:
                self._file.close()
            self._path, self._file = path, path.open("rb", buffering=0)
            if hasattr(os, "posix_fadvise"):  # the system then reads further ahead; a tenth of a merge's time
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._start = 8 + int.from_bytes(self._file.read(8), "little")
        return self._file


def row_blocks(shape: tuple[int, ...], block_numel: int = BLOCK_NUMEL) -> Iterator[slice]:
    """Splits a tensor's first dimension into blocks of about as many numbers as asked for, at least a row each."""
    if not shape:
        yield slice(None)
        return
    step = max(1, block_numel // max(1, prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))
