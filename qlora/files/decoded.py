"""Tensors that files hold in parts, such as codes and scales, as the values that they stand for."""

from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import torch

from qlora.files.stored import StoredTensors


class Encoded(Protocol):
    """A tensor that is stored in parts.

    Attributes:
        shape: Its shape.
        dtype: The dtype that it is decoded to.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: slice) -> torch.Tensor:
        """Decode some rows, along the first dimension."""
        ...


class DecodedTensors:
    """Stored tensors by name, with those in parts decoded as they are read; a :class:`TensorReader`.

    Args:
        stored: All tensors of the files.
        encoded: Those that are decoded, by the names of what they stand for.
        parts: Names of stored tensors that are only parts of these, or that are left out.
    """

    def __init__(self, stored: StoredTensors, encoded: Mapping[str, Encoded], parts: Collection[str]) -> None:
        self._stored, self._encoded = stored, encoded
        self._names = dict.fromkeys([*(name for name in stored if name not in parts), *encoded])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor once it is decoded."""
        return self._encoded[name].shape if name in self._encoded else self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is decoded to, or stored in.

        Raises:
            ExportError: The dtype is not supported.
        """
        return self._encoded[name].dtype if name in self._encoded else self._stored.dtype(name)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Read a tensor, or some of its rows (along its first dimension), decoded.

        Raises:
            ExportError: A file ends before the tensor does, or a dtype is not supported.
        """
        return self._encoded[name].read(rows) if name in self._encoded else self._stored.read(name, rows)
