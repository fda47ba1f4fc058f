"""FP8 weights: 8-bit floating-point numbers that are values once they are multiplied by their scales.

A weight has one scale, one for each row, or one for each block (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). Scales
of activations are for products in FP8 and have no effect on products in 16 bits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora.errors import ModelError
from qlora.files.decoded import DecodedTensors
from qlora.files.stored import DTYPES, FP8_DTYPES, StoredTensors, row_blocks

# Endings of the scale of a weight, after the weight's name; Mistral's own files end in the last one.
SCALE_ENDINGS = ("_scale_inv", "_scale")
ACTIVATION_ENDINGS = (".activation_scale", ".input_scale", ".input_scale_ub", ".qscale_act", ".k_scale", ".v_scale")
DEFAULT_BLOCK = (128, 128)


def fp8_tensors(
    headers: Mapping[Path, Mapping[str, Any]], block: tuple[int, int] = DEFAULT_BLOCK, base: str = "base"
) -> DecodedTensors:
    """Return a reader of files with FP8 weights, which are decoded to fp32.

    Args:
        headers: Dtype, shape and offsets of the tensors in each file.
        block: Rows and columns of a block that shares a scale.
        base: Name of the base, for messages.

    Raises:
        ModelError: A weight has no scale, or scales for another shape.
    """
    stored = StoredTensors(headers, DTYPES | FP8_DTYPES)
    names = {*stored}
    encoded, parts, problems = {}, {name for name in names if name.endswith(ACTIVATION_ENDINGS)}, []
    for name in stored:
        if stored.dtype_name(name) not in FP8_DTYPES:
            continue
        scale = next((name + ending for ending in SCALE_ENDINGS if name + ending in names), None)
        if scale is None:
            problems.append(f"{name} has no scale")
        elif not _fits(stored.shape(name), stored.shape(scale), block):
            problems.append(f"{name} is {stored.shape(name)}, but its scales are {stored.shape(scale)}")
        else:
            encoded[name] = _Fp8Weight(stored, name, scale, block)
            parts.add(scale)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(
            f"{base}: FP8 weights can't be decoded in blocks of {block[0]} × {block[1]}: {'; '.join(problems[:3])}"
            f"{more}. Use the same model in 16-bit safetensors."
        )
    return DecodedTensors(stored, encoded, parts)


class _Fp8Weight:
    """A weight times its scales, read by rows."""

    dtype = torch.float32

    def __init__(self, stored: StoredTensors, name: str, scale: str, block: tuple[int, int]) -> None:
        self._stored, self._name, self._scale = stored, name, scale
        self.shape = stored.shape(name)
        self._block = _block_of(self.shape, stored.shape(scale), block)

    def read(self, rows: slice) -> torch.Tensor:
        """Decode some rows; of experts' weights, some experts."""
        values = self._stored.read(self._name, rows).float()
        scales = self._stored.read(self._scale).float()
        if scales.numel() == 1:
            return values.mul_(scales.view(()))
        *leading, height, width = self.shape
        scales = scales.view(*leading, -(-height // self._block[0]), -(-width // self._block[1]))
        first, _, _ = rows.indices(self.shape[0])
        for part in row_blocks(tuple(values.shape)):  # the scales of all elements would take as much as the weight
            values[part] *= self._by_element(scales, slice(first + part.start, first + part.stop))
        return values

    def _by_element(self, scales: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the scale of each element of some rows."""
        height, width = self._block
        columns = torch.arange(self.shape[-1]) // width
        if len(self.shape) == 2:
            return scales[torch.arange(rows.start, rows.stop) // height][:, columns]
        return scales[rows][:, torch.arange(self.shape[1]) // height][:, :, columns]


def _block_of(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns that share a scale: a row of its own where there are as many scales as rows."""
    *leading, rows, columns = shape
    per_row = {(*leading, rows), (*leading, rows, 1)}
    return (1, columns) if scales in per_row else block


def _fits(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> bool:
    if len(shape) not in (2, 3):
        return False
    if scales in ((), (1,), (1, 1)):
        return True
    *leading, rows, columns = shape
    return scales == (*leading, -(-rows // block[0]), -(-columns // block[1])) or _block_of(shape, scales, block) == (
        1,
        columns,
    )
