"""Measure dequantization on a GPU as a share of a plain copy's bandwidth: the fused kernel and bitsandbytes.

For the shapes of Llama-3.1-8B's linears, in NF4 with double quantization, to bf16: the fused kernel, bitsandbytes'
three launches, and both with the LoRA term added to the weight. If the two differ in a bit without that term, the
script fails. It needs CUDA and Triton. Without docs/benchmarks/dequantize.md, it has not been run on a GPU. With
--tiny, a CPU measures a small weight in fp16 by Triton's interpreter, which only shows that the script runs.

    python -m scripts.dev.bench.dequantize --out docs/benchmarks/dequantize.md
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch

from scripts.dev.bench.common import append, heading

SHAPES = {
    "q_proj, o_proj": (4096, 4096),
    "k_proj, v_proj": (1024, 4096),
    "gate_proj, up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
# Codes, an absmax in 8 bits for 64 of them, and an fp32 for 256 of these; then what is written.
BYTES_READ = 1 / 2 + 1 / 64 + 4 / (64 * 256)
TINY = {"tiny": (64, 128)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bf16.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
# More than any GPU's cache holds, so that every pass over the weights comes from memory.
BYTES_IN_TURN = 1 << 29
TITLE = """# Dequantization as a share of a copy

`python -m scripts.dev.bench.dequantize --out docs/benchmarks/dequantize.md`. NF4 with double quantization to bf16, in
blocks of 64. Times are the median of ten runs of a CUDA graph over more weights than any cache holds, without
launches on the host. A share is 2.516 bytes per parameter over that time, divided by the bandwidth of a copy between
two buffers on the same device, which counts bytes read and written. The factors of the LoRA term are not counted.
"""


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="*", default=[16, 64], help="ranks of the LoRA term")
    parser.add_argument("--tiny", action="store_true", help="a small weight, on a CPU too")
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        shapes = ", ".join(f"{out} × {width}" for out, width in SHAPES.values())
        sys.exit(
            "There is no CUDA device here. On one, this measures the bandwidth of the fused NF4 dequantization and of "
            f"bitsandbytes' as shares of a copy's, for weights of {shapes}, without the LoRA term and with it."
        )
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is imported
    lines = table(arguments.rank, TINY if arguments.tiny else SHAPES, 1 << 14 if arguments.tiny else BYTES_IN_TURN)
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def table(ranks: list[int], shapes: dict[str, tuple[int, int]], bytes_in_turn: int) -> list[str]:
    """Return the rows of all shapes, without the LoRA term and with one of each rank."""
    copy = bandwidth_of_copy(bytes_in_turn)
    lines = [
        *heading("a tiny weight" if shapes is TINY else "Llama-3.1-8B's linears", "torch", "triton", "bitsandbytes"),
        f"A copy moves {copy / 1e9:.0f} GB/s.",
        "",
        "| linear | out × in | LoRA rank | fused µs | share of a copy | bitsandbytes µs | share | times as fast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in shapes.items():
        for rank in [0, *ranks]:
            fused, theirs = measure(shape, rank, bytes_in_turn)
            num_bytes = shape[0] * shape[1] * (BYTES_READ + DTYPE.itemsize)
            lines.append(
                f"| {name} | {shape[0]} × {shape[1]} | {rank or 'none'} | {fused * 1e6:.1f} "
                f"| {num_bytes / fused / copy:.0%} | {theirs * 1e6:.1f} | {num_bytes / theirs / copy:.0%} "
                f"| {theirs / fused:.2f} |"
            )
    return lines


def bandwidth_of_copy(num_bytes: int) -> float:
    """Return the bytes per second that a copy on the device reads and writes."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def measure(shape: tuple[int, int], rank: int, bytes_in_turn: int) -> tuple[float, float]:
    """Return the seconds for a weight by the fused kernel and by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit

    from qlora.kernels.dequantize_triton import dequantize_4bit_triton
    from qlora.nf4 import quantize

    per_weight = shape[0] * shape[1] * (BYTES_READ + DTYPE.itemsize)
    num_weights = max(2, round(bytes_in_turn / per_weight))
    weight = torch.randn(shape, dtype=DTYPE, device=DEVICE)
    quantized = [quantize(weight) for _ in range(num_weights)]
    outs = [torch.empty_like(weight) for _ in range(num_weights)]
    A = torch.randn(rank, shape[1], dtype=DTYPE, device=DEVICE) / shape[1] ** 0.5
    B = torch.randn(shape[0], rank, dtype=DTYPE, device=DEVICE)
    lora: dict[str, Any] = {"lora_A": A, "lora_B": B, "scaling": 2.0} if rank else {}

    def fused(index: int) -> torch.Tensor:
        packed, state = quantized[index]
        nested = state.state2
        return dequantize_4bit_triton(
            packed, state.code, state.absmax, shape, DTYPE, state.blocksize, nested_code=nested.code,
            nested_absmax=nested.absmax, nested_offset=state.offset, nested_block_size=nested.blocksize,
            out=outs[index], **lora,
        )  # fmt: skip

    def theirs(index: int) -> torch.Tensor:
        packed, state = quantized[index]
        result = dequantize_4bit(packed, state, out=outs[index]) if packed.is_cuda else dequantize_4bit(packed, state)
        return result.addmm_(B, A, alpha=2.0) if rank else result

    if not rank and not torch.equal(fused(0).clone().view(torch.int16), theirs(0).view(torch.int16)):
        sys.exit(f"The fused kernel gives other bits than bitsandbytes for a weight of {shape[0]} × {shape[1]}.")
    return tuple(seconds(in_turn(kernel, num_weights)) for kernel in (fused, theirs))


def in_turn(kernel: Callable[[int], Any], num_weights: int) -> Callable[[], Any]:
    """Return a function that runs the kernel on the next weight at each call."""
    numbers = count()
    return lambda: kernel(next(numbers) % num_weights)


def seconds(function: Callable[[], Any]) -> float:
    """Return the median time of a call on the device, on a GPU without the launch on the host."""
    if DEVICE == "cpu":
        marks = [(time.perf_counter(), function()) for _ in range(4)]
        return statistics.median(after - before for (before, _), (after, _) in pairwise(marks))
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(function, rep=100, return_mode="median") / 1e3


if __name__ == "__main__":
    main()
