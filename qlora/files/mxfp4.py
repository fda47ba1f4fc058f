"""MXFP4 weights as gpt-oss is published: 4-bit numbers (E2M1) with a power of two (E8M0) for each 32 of them.

Format: OCP Microscaling Formats (MX) Specification 1.0. `NAME_blocks` (experts, out, groups, 16) holds two numbers a
byte, the first in its lower half, and `NAME_scales` (experts, out, groups) the exponents plus 127. The parameter NAME
of transformers is (experts, in, out).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora.errors import ModelError
from qlora.files.decoded import DecodedTensors
from qlora.files.stored import StoredTensors

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BIAS = 127


def mxfp4_tensors(headers: Mapping[Path, Mapping[str, Any]], base: str = "base") -> DecodedTensors:
    """Return a reader of files with MXFP4 weights, which are decoded to bf16: it represents each of them exactly.

    Args:
        headers: Dtype, shape and offsets of the tensors in each file.
        base: Name of the base, for messages.

    Raises:
        ModelError: Blocks have no scales, or scales for another shape.
    """
    stored = StoredTensors(headers)
    names = {*stored}
    encoded, parts = {}, set[str]()
    for blocks in (name for name in stored if name.endswith(BLOCKS) and stored.dtype_name(name) == "U8"):
        name = blocks.removesuffix(BLOCKS)
        scales = name + SCALES
        if scales not in names or stored.shape(scales) != stored.shape(blocks)[:-1] or len(stored.shape(blocks)) != 4:
            raise ModelError(f"{base}: {blocks} has no {SCALES} of its shape; download the base again.")
        encoded[name] = _Mxfp4Weight(stored, blocks, scales)
        parts |= {blocks, scales}
    return DecodedTensors(stored, encoded, parts)


class _Mxfp4Weight:
    """The weights of experts, read by expert."""

    dtype = torch.bfloat16

    def __init__(self, stored: StoredTensors, blocks: str, scales: str) -> None:
        self._stored, self._blocks, self._scales = stored, blocks, scales
        experts, out, groups, num_bytes = stored.shape(blocks)
        self.shape: tuple[int, ...] = (experts, groups * num_bytes * 2, out)

    def read(self, rows: slice) -> torch.Tensor:
        codes, exponents = (self._stored.read(name, rows) for name in (self._blocks, self._scales))
        values = torch.tensor(VALUES, dtype=self.dtype)
        decoded = torch.empty(*codes.shape, 2, dtype=self.dtype)
        for expert in range(len(codes)):  # indices take four times the bytes of what is decoded
            decoded[expert, ..., 0] = values[(codes[expert] & 0xF).int()]
            decoded[expert, ..., 1] = values[(codes[expert] >> 4).int()]
        torch.ldexp(decoded, exponents.int()[..., None, None] - BIAS, out=decoded)
        return decoded.view(len(codes), self.shape[2], self.shape[1]).transpose(1, 2).contiguous()
