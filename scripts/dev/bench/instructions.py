"""Count the instructions per weight and the registers of the dequantization kernel, compiled for GPUs not present.

Every instruction of a thread is counted once, which is how often it runs at these ranks, and divided by the thread's
weights.

    python -m scripts.dev.bench.instructions --out docs/benchmarks/instructions.md
"""

import argparse
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.dev.bench.common import append, heading
from scripts.dev.bench.launched import CAPABILITIES, compile_launches

RANKS = (0, 16, 32)
SHAPE = (4096, 4096)
TITLE = """# Instructions of the dequantization kernel
"""


class Usage(NamedTuple):
    """What a thread of a compiled kernel takes.

    Attributes:
        instructions: Number of instructions.
        per_weight: The same, divided by the number of weights that the thread writes.
        registers: Number of registers.
        spilled: Bytes kept in memory for want of registers.
    """

    instructions: int
    per_weight: float
    registers: int
    spilled: int


def main() -> None:
    """Count, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    lines = table()
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def table() -> list[str]:
    """Return a row for each GPU architecture."""
    kinds = [f"rank {rank}" if rank else "plain" for rank in RANKS]
    lines = [
        *heading("instructions per weight", "torch", "triton"),
        f"NF4 with double quantization to bf16, {SHAPE[0]} × {SHAPE[1]}, with a LoRA term of a rank or without.",
        "",
        "| GPU | " + " | ".join(f"{kind}: instructions per weight | registers" for kind in kinds) + " |",
        "|---" * (1 + 2 * len(kinds)) + "|",
    ]
    for capability in CAPABILITIES:
        found = [dequantization(capability, rank) for rank in RANKS]
        cells = [f"{each.per_weight:.1f} | {each.registers}" for each in found]
        lines.append(f"| sm_{capability} | {' | '.join(cells)} |")
    return lines


def dequantization(capability: int, rank: int = 0, shape: tuple[int, int] = SHAPE) -> Usage:
    """Return what the kernel that dequantizes a weight takes.

    Args:
        capability: Compute capability of the GPU, such as 89.
        rank: Rank of the LoRA term; 0 for none.
        shape: (out, in).
    """
    from qlora.kernels import dequantize_triton as module

    blocks = prod(shape) // 64
    lora: dict[str, Any] = {}
    if rank:
        lora = {"lora_A": _meta(rank, shape[1]), "lora_B": _meta(shape[0], rank), "scaling": 2.0}
    (compiled,) = compile_launches(
        module,
        lambda module: module.dequantize_4bit_triton(
            _meta(prod(shape) // 2, dtype=torch.uint8), _meta(16, dtype=torch.float32),
            _meta(blocks, dtype=torch.uint8), shape, torch.bfloat16, nested_code=_meta(256, dtype=torch.float32),
            nested_absmax=_meta(-(-blocks // 256), dtype=torch.float32), nested_offset=_meta(dtype=torch.float32),
            **lora,
        ),
        capability,
    )  # fmt: skip
    count = len(compiled.instructions())
    return Usage(count, count / (prod(shape) / compiled.threads), compiled.registers, compiled.spilled)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


if __name__ == "__main__":
    main()
