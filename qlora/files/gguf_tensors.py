"""Tensors of a GGUF file by their names in transformers, decoded by the gguf package as they are read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.errors import ExportError

# Restores transformers' layout of a decoded tensor, by its name in the file.
Restore = Callable[[str, np.ndarray], np.ndarray]
PLAIN_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a GGUF file holds a tensor.

    Attributes:
        kind: ggml's number of its type.
        shape: Its shape, in torch's order.
        start: Offset of its first byte.
        num_bytes: Number of its bytes.
    """

    kind: int
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class GGUFTensors:
    """Tensors of a GGUF file; a :class:`qlora.files.stored.TensorReader`.

    Args:
        path: The file.
        places: Where it holds its tensors, by its own names.
        sources: Names of the tensors in the file by transformers' names; several are joined along the second
            dimension, as experts' gates and up projections.
        shapes: Shapes in transformers, by its names.
        restore: Restores transformers' order of the rows, and the like.
    """

    def __init__(
        self,
        path: Path,
        places: Mapping[str, Place],
        sources: Mapping[str, Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
        restore: Restore,
    ) -> None:
        self._path, self._places, self._sources = path, places, sources
        self._shapes, self._restore = shapes, restore
        self._orders: dict[str, np.ndarray | None] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in transformers."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is decoded to: its own, or fp32 for a quantized one."""
        dtypes = {PLAIN_KINDS.get(self._kind(source).name, torch.float32) for source in self._sources[name]}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Read a tensor, or some of its rows, decoded and in transformers' layout.

        Raises:
            ExportError: The file ends before the tensor does.
        """
        sources = self._sources[name]
        orders = [self._order(source) for source in sources]
        ordered = [order for order in orders if order is not None]
        if len(ordered) == len(sources):
            decoded = [self._decode(source, order[rows]) for source, order in zip(sources, ordered, strict=True)]
            whole = decoded[0] if len(decoded) == 1 else torch.cat([part.to(self.dtype(name)) for part in decoded], 1)
            return whole.view(len(whole), *self._shapes[name][1:])
        parts = [self._restore(source, self._decode(source).float().numpy()) for source in sources]
        whole = torch.from_numpy(np.concatenate(parts, axis=1) if len(parts) > 1 else np.ascontiguousarray(parts[0]))
        return whole.view(self._shapes[name])[rows].to(self.dtype(name))

    def _kind(self, source: str) -> Any:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self._places[source].kind)

    def _order(self, source: str) -> np.ndarray | None:
        """Return the row of the file that is each row in transformers; None if more than their order differs."""
        if source not in self._orders:
            self._orders[source] = self._find_order(source)
        return self._orders[source]

    def _find_order(self, source: str) -> np.ndarray | None:
        num_rows, *widths = self._places[source].shape or (1,)
        if not widths:
            return None
        # A few columns of different sizes, each with its number, so that a transposed, shifted or otherwise changed
        # tensor does not look like one in another order.
        columns = np.arange(prod(range(2, 2 + len(widths)))).reshape(range(2, 2 + len(widths))) / 2**10
        rows = np.arange(num_rows, dtype=np.float64).reshape(-1, *(1 for _ in widths))
        try:
            tried = self._restore(source, rows + columns)
        except (ValueError, TypeError):  # it needs the tensor's own columns
            return None
        if tried.shape != (num_rows, *columns.shape):
            return None
        order = tried.reshape(num_rows, -1)[:, 0].astype(np.int64)
        is_order = np.array_equal(tried, rows[order % num_rows] + columns) and np.array_equal(np.sort(order), rows.flat)
        return order if is_order else None

    def _decode(self, source: str, rows: np.ndarray | None = None) -> torch.Tensor:
        """Return a tensor in the file's layout, or rows of it in the order given."""
        from gguf import quants

        place, kind = self._places[source], self._kind(source)
        num_rows, *widths = place.shape or (1,)
        row_bytes = place.num_bytes // max(1, num_rows)
        dtype = PLAIN_KINDS.get(kind.name, torch.float32)
        if rows is not None and not len(rows):
            return torch.empty(0, *widths, dtype=dtype)
        first, last = (0, num_rows) if rows is None else (int(rows.min()), int(rows.max()) + 1)
        count = (last - first) * row_bytes
        raw = np.fromfile(self._path, dtype=np.uint8, count=count, offset=place.start + first * row_bytes)
        if len(raw) < count:
            raise ExportError(f"{self._path} ends within {source}; it changed while it was read.")
        raw = raw.reshape(last - first, row_bytes)
        if rows is not None:
            raw = raw[rows - first]
        shape = (len(raw), *widths) if place.shape else ()
        if kind.name in PLAIN_KINDS:
            return torch.from_numpy(raw.reshape(-1).copy()).view(dtype).view(shape)
        in_bytes = (*shape[:-1], row_bytes // prod(widths[:-1]))
        return torch.from_numpy(quants.dequantize(raw.reshape(in_bytes), kind).reshape(shape))
