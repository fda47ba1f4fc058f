"""4-bit weights in checkpoint files: the tensors that bitsandbytes stores a weight in, and their names."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from qlora.nf4.quantize import BLOCK_SIZE, NESTED_BLOCK_SIZE

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

# A weight's shape, dtype and block sizes are JSON text in a uint8 tensor of this name, which ends with the data type.
QUANT_STATE = ".quant_state.bitsandbytes__"
# JSON ignores trailing spaces, so padding the text makes its size known before the weight is quantized.
QUANT_STATE_BYTES = 256


def statistics_by_weight(names: Iterable[str]) -> dict[str, list[str]]:
    """Find the weights that a checkpoint stores in 4 bits.

    Args:
        names: Names of all tensors in the checkpoint.

    Returns:
        The names of each weight's statistics, by the name of the weight, in the order of `names`.
    """
    names = list(names)
    found: dict[str, list[str]] = {
        name.removesuffix(".absmax"): [] for name in names if name.endswith(".weight.absmax")
    }
    for name in names:
        module, separator, _ = name.rpartition(".weight.")
        weight = f"{module}.weight"
        if separator and weight in found:
            found[weight].append(name)
    return found


def from_checkpoint_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, "QuantState"]:
    """Read a weight in the format that bitsandbytes stores.

    Args:
        tensors: `weight` and its statistics, `weight.*`, by these names. The mapping is left unchanged.

    Returns:
        The packed codes and their state, as :func:`qlora.nf4.quantize` gives them.
    """
    from bitsandbytes.functional import QuantState

    # `from_dict` empties the mapping that it is given.
    statistics = {name: tensor for name, tensor in tensors.items() if name != "weight"}
    packed = tensors["weight"]
    return packed, QuantState.from_dict(statistics, device=packed.device)


def to_checkpoint_tensors(name: str, packed: torch.Tensor, state: "QuantState") -> dict[str, torch.Tensor]:
    """Return the tensors that a quantized weight is stored in, with the layout of :func:`checkpoint_layout`.

    Args:
        name: Name of the weight.
        packed: Its codes, as :func:`qlora.nf4.quantize` gives them.
        state: Their state.
    """
    tensors = {name: packed} | {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    key = f"{name}{QUANT_STATE}nf4"
    text = bytes(tensors[key].tolist())
    assert len(text) <= QUANT_STATE_BYTES, f"{name}: {text!r}"
    tensors[key] = torch.tensor(list(text.ljust(QUANT_STATE_BYTES)), dtype=torch.uint8)
    return tensors


def checkpoint_layout(name: str, numel: int, double_quant: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of the tensors that a weight is stored in, by name and in the order of writing.

    Args:
        name: Name of the weight.
        numel: Number of its parameters.
        double_quant: Whether the blocks' statistics are quantized too.
    """
    blocks = math.ceil(numel / BLOCK_SIZE)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: ((math.ceil(numel / 2), 1), torch.uint8),
        f"{name}.absmax": ((blocks,), torch.uint8 if double_quant else torch.float32),
        f"{name}.quant_map": ((16,), torch.float32),
    }
    if double_quant:
        layout[f"{name}.nested_absmax"] = ((math.ceil(blocks / NESTED_BLOCK_SIZE),), torch.float32)
        layout[f"{name}.nested_quant_map"] = ((256,), torch.float32)
    return layout | {f"{name}{QUANT_STATE}nf4": ((QUANT_STATE_BYTES,), torch.uint8)}
