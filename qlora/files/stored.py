"""Tensors of safetensors files, read by rows."""

import os
from collections.abc import Iterator, Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from qlora.errors import ExportError
from qlora.files.shards import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Dtypes of weights that are values only together with their scales.
FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Elements per block of rows. With fewer, whose temporary tensors would fit a core's cache, the calls of operations take
# longer than is saved.
BLOCK_NUMEL = 1 << 20


class TensorReader(Protocol):
    """Tensors by name that can be read by rows, independent of their storage format."""

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is read in."""
        ...

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Read a tensor, or some of its rows (along its first dimension)."""
        ...


class StoredTensors:
    """Tensors by name, of which single rows can be read; threads may read at the same time.

    safetensors' own slices either map the file, whose pages count as this process's memory, or read the whole tensor.

    Args:
        headers: Dtype, shape and offsets of the tensors in each file, from :func:`qlora.files.headers.read_header`.
        dtypes: Dtypes that can be read, by safetensors' names.
    """

    def __init__(self, headers: Mapping[Path, Mapping[str, Any]], dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        self._dtypes = dtypes
        self._entries = {name: (path, entry) for path, header in headers.items() for name, entry in header.items()}
        self._opened: dict[Path, tuple[FileIO, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._entries[name][1]["shape"])

    def dtype_name(self, name: str) -> str:
        """Return the dtype of a tensor as safetensors names it: F16, BF16, I64, …"""
        return self._entries[name][1]["dtype"]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor.

        Raises:
            ExportError: The dtype is not supported.
        """
        stored_in = self.dtype_name(name)
        if stored_in not in self._dtypes:
            raise ExportError(
                f"{self._entries[name][0]}: {name} is in {stored_in}; supported are {', '.join(self._dtypes)} and "
                "bitsandbytes 4-bit."
            )
        return self._dtypes[stored_in]

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Read a tensor, or some of its rows (along its first dimension).

        Raises:
            ExportError: The file ends before the tensor does, or the dtype is not supported.
        """
        shape = self.shape(name)
        first = 0
        if shape:
            first, last, _ = rows.indices(shape[0])
            shape = (last - first, *shape[1:])
        values = torch.empty(shape, dtype=self.dtype(name))
        buffer = values.view(-1).view(torch.uint8).numpy().data
        path, entry = self._entries[name]
        file, start = self._open(path)
        offset = start + entry["data_offsets"][0] + first * prod(shape[1:]) * values.itemsize
        while buffer:  # a read returns at most 2 GiB
            count = os.preadv(file.fileno(), [buffer], offset)
            if not count:
                raise ExportError(f"{path} ends within {name}; it changed while it was read.")
            buffer, offset = buffer[count:], offset + count
        return values

    def _open(self, path: Path) -> tuple[FileIO, int]:
        """Return the open file, and the offset of its first tensor."""
        if path not in self._opened:
            file = path.open("rb", buffering=0)
            if hasattr(os, "posix_fadvise"):  # the system reads further ahead, which saves a tenth of a merge's time
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._opened[path] = file, 8 + int.from_bytes(file.read(8), "little")
        return self._opened[path]


class LazyTensor:
    """A stored tensor that is read when it is indexed; transformers loads it like a slice of safetensors."""

    def __init__(self, stored: TensorReader, name: str) -> None:
        self._stored, self._name = stored, name

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._stored.shape(self._name))

    def get_dtype(self) -> str:
        """Return the dtype as safetensors names it."""
        return DTYPE_NAMES[self._stored.dtype(self._name)]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._stored.read(self._name)[index]


def row_blocks(shape: tuple[int, ...], block_numel: int = BLOCK_NUMEL) -> Iterator[slice]:
    """Split a tensor's first dimension into blocks of about `block_numel` elements, with at least one row each."""
    if not shape:
        yield slice(None)
        return
    step = max(1, block_numel // max(1, prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))
