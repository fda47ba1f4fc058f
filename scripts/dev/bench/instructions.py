"""Count the instructions per weight and the registers of the dequantization kernel, compiled for GPUs not present.

The launcher is called with tensors on the meta device; what it would launch is compiled by Triton as on a GPU, and the
code is disassembled with the `cuobjdump` in Triton's package. Every instruction of a thread is counted once, which is
how often it runs at these ranks, and divided by the thread's weights.

    python -m scripts.dev.bench.instructions --out docs/benchmarks/instructions.md
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from scripts.dev.bench.common import append, heading

CAPABILITIES = (80, 86, 89, 90, 100, 120)
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
    launches: list[tuple[Any, ...]] = []
    kernel = module._dequantize_kernel
    module._dequantize_kernel = _Recorder(launches)
    try:
        module.dequantize_4bit_triton(
            _meta(prod(shape) // 2, dtype=torch.uint8), _meta(16, dtype=torch.float32),
            _meta(blocks, dtype=torch.uint8), shape, torch.bfloat16, nested_code=_meta(256, dtype=torch.float32),
            nested_absmax=_meta(-(-blocks // 256), dtype=torch.float32), nested_offset=_meta(dtype=torch.float32),
            **lora,
        )  # fmt: skip
    finally:
        module._dequantize_kernel = kernel
    ((grid, args, options),) = launches
    with _compiling_for(capability):
        compiled = kernel.warmup(*args, grid=(1,), **options)
    return _usage(compiled.asm["cubin"], prod(shape) / (prod(grid) * 32 * options["num_warps"]))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Recorder:
    """Stands for a kernel, and records its launches instead."""

    def __init__(self, launches: list[tuple[Any, ...]]) -> None:
        self._launches = launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self._launches.append((grid, args, options))


@contextmanager
def _compiling_for(capability: int) -> Iterator[None]:
    """Have Triton compile for a GPU that need not be present."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver, before = triton.runtime.driver, triton.runtime.driver._active
    driver._active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # kernels are kept by device
        get_current_stream=lambda _device: 0,
    )
    try:
        yield
    finally:
        driver._active = before


def _usage(cubin: bytes, weights: float) -> Usage:
    code, usage = (_cuobjdump(cubin, option) for option in ("-sass", "-res-usage"))
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", code, re.MULTILINE)
    # The code ends in a jump to itself and in instructions that do nothing, which no thread comes to.
    count = sum(not each.startswith("NOP") for each in found) - 1
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL"))
    return Usage(count, count / weights, registers, stack + local)


def _cuobjdump(cubin: bytes, option: str) -> str:
    """Return what CUDA's tool, which is in Triton's package, says about a GPU's code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
