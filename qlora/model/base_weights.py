"""The weights that a base's files hold, read one at a time in any supported format."""

import math
from collections.abc import Collection
from typing import Any

import torch

from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.files.json_files import parse_object
from qlora.files.stored import LazyTensor
from qlora.model.formats import READERS, expert_type, weight_format
from qlora.nf4 import QUANT_STATE, from_checkpoint_tensors, statistics_by_weight


class BaseWeights:
    """The weights of a base by their names in its files.

    A weight stored in 4 bits is one entry, together with the statistics that decode its codes. bitsandbytes
    stores it as (out, in), also in models such as GPT-2, whose other files have (in, out).

    Args:
        files: The base's files.

    Attributes:
        shapes: The shape of every weight and buffer by name, in the files' order.
        expert_type: Type of the codes that experts have in 4 bits, see :func:`qlora.model.formats.expert_type`.

    Raises:
        ModelError: The format is not supported, or a 4-bit weight's state is damaged.
    """

    def __init__(self, files: BaseFiles) -> None:
        self._base = files.name
        self._stored = READERS[weight_format(files)](files)
        self.expert_type = expert_type(files)
        self._statistics = statistics_by_weight(self._stored)
        statistics = {name for names in self._statistics.values() for name in names}
        self.shapes = {name: self._shape(name) for name in self._stored if name not in statistics}

    @property
    def num_parameters(self) -> int:
        """Number of values in all weights and buffers."""
        return sum(map(math.prod, self.shapes.values()))

    def is_4bit(self, name: str) -> bool:
        """Return whether a weight is stored in 4 bits."""
        return name in self._statistics

    def is_floating_point(self, name: str) -> bool:
        """Return whether the values are floating-point numbers once they are decoded."""
        return self.is_4bit(name) or self.dtype(name).is_floating_point

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in, or decoded to; uint8 for a weight in bitsandbytes' 4 bits.

        Raises:
            ExportError: The dtype cannot be read.
        """
        return self._stored.dtype(name)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Read a tensor that is not stored in bitsandbytes' 4 bits, or some of its rows, decoded.

        Raises:
            ExportError: The file ends before the tensor does, or its dtype cannot be read.
        """
        assert not self.is_4bit(name), f"{name} is stored in 4 bits"
        return self._stored.read(name, rows)

    def read_4bit(self, name: str, device: torch.device) -> tuple[torch.Tensor, Any]:
        """Read a weight that is stored in 4 bits: its codes and their state, as :func:`qlora.nf4.quantize` gives them.

        Raises:
            ExportError: The file ends before the tensor does.
        """
        prefix = name.removesuffix("weight")
        keys = (name, *self._statistics[name])
        return from_checkpoint_tensors({key.removeprefix(prefix): self._stored.read(key).to(device) for key in keys})

    def lazy(self, weights: Collection[str] | None = None) -> dict[str, LazyTensor]:
        """Return tensors of the files without reading them; a weight in 4 bits is several tensors.

        Args:
            weights: Names of the weights; None for all.
        """
        weights = self.shapes if weights is None else weights
        names = {name for weight in weights for name in (weight, *self._statistics.get(weight, ()))}
        return {name: LazyTensor(self._stored, name) for name in self._stored if name in names}

    def _shape(self, name: str) -> tuple[int, ...]:
        if not self.is_4bit(name):
            return self._stored.shape(name)
        try:
            state = next(key for key in self._statistics[name] if key.startswith(f"{name}{QUANT_STATE}"))
            shape = tuple(parse_object(bytes(self._stored.read(state).tolist()))["shape"])
            num_codes = 2 * math.prod(self._stored.shape(name)) * self._stored.dtype(name).itemsize
            if any(type(number) is not int or number < 1 for number in shape) or num_codes < math.prod(shape):
                raise ValueError(f"a shape of {shape}")
        except (StopIteration, ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"{self._base}: the 4-bit state of {name} is damaged ({error!r}); download it again."
            ) from None
        return shape
