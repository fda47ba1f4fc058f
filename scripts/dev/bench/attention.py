"""Measure causal attention on a CPU in bf16: products of blocks and torch's kernel, forward and backward.

One thread, in the order A B B A, as CPU seconds of the fastest of several calls. A table is appended to
docs/benchmarks/attention.md. With `--lengths`, documents get new lengths in every call, and the growth of resident
memory is measured too, each side in a process of its own.

    python -m scripts.dev.bench.attention --out docs/benchmarks/attention.md
    python -m scripts.dev.bench.attention --lengths --out docs/benchmarks/attention.md
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qlora.kernels import causal_attention
from qlora.model.host_memory import keep_freed_memory
from scripts.dev.bench.common import append, heading, run_child
from scripts.dev.bench.train_step import resident

TITLE = """# Attention on a CPU

`python -m scripts.dev.bench.attention`, and with `--lengths` for new lengths in every call. CPU milliseconds of one
layer in bf16 and on one thread, forward + backward, the fastest of ten calls. torch's kernel is
`scaled_dot_product_attention`, called for each document, with its results joined. Blocks round scores to bf16, as eager
attention does: their outputs differ from exact ones by 3.5e-3, and those of torch's kernel by 2e-3, of their norm.
"""
# Query heads, key heads, head size and documents' lengths.
SHAPES = [
    (8, 4, 64, [512] * 2),
    (8, 4, 64, [128] * 8),
    (8, 4, 64, [64] * 16),
    (8, 4, 64, [20] * 50),
    (9, 3, 64, [512] * 2),
    (32, 8, 128, [1024]),
    (8, 8, 64, [2048]),
]
CALLS, TOKENS = 5, 1024
Attend = Callable[..., torch.Tensor]


def by_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Compute attention by torch's kernel, a document at a time."""
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*each, is_causal=True, enable_gqa=True) for each in documents]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


SIDES: dict[str, Attend] = {"torch": by_kernel, "blocks": causal_attention}


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", action="store_true", help="new lengths in every call")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a process that has loaded a base does
    if arguments.side:
        print(json.dumps(measure_lengths(SIDES[arguments.side])))
        return
    lines = table_of_lengths() if arguments.lengths else table()
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def table() -> list[str]:
    """Return the rows of all shapes."""
    lines = [
        *heading("Lengths that recur", "torch"),
        "| heads | documents | torch, ms | blocks, ms | torch ÷ blocks |",
        "|---|---|---|---|---|",
    ]
    for heads, kv_heads, size, lengths in SHAPES:
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
        for side in (*SIDES, *reversed(SIDES)):
            times[side] += [seconds(SIDES[side], heads, kv_heads, size, lengths) for _ in range(CALLS)]
        best = {side: [min(column) * 1e3 for column in zip(*own, strict=True)] for side, own in times.items()}
        both = [" + ".join(f"{each:.2f}" for each in (forward, all_ - forward)) for forward, all_ in best.values()]
        ratio = best["torch"][1] / best["blocks"][1]
        name = f"{heads} of {size}, {kv_heads} for keys"
        lines.append(f"| {name} | {len(lengths)} × {lengths[0]} | {' | '.join(both)} | {ratio:.2f} |")
    return lines


def table_of_lengths() -> list[str]:
    """Return the rows of calls whose documents have new lengths each time."""
    lines = [
        *heading("New lengths in every call", "torch"),
        f"60 calls with documents of 15 to 220 tokens, {TOKENS:,} and more in all; 9 heads of 64, 3 for keys.",
        "",
        "| side | median of calls 2 to 20, ms | of the last 20, ms | memory taken by 60 calls, MB |",
        "|---|---|---|---|",
    ]
    for side in (*SIDES, *reversed(SIDES)):
        early, late, taken = run_child(__spec__.name, "--side", side)
        lines.append(f"| {side} | {early * 1e3:.1f} | {late * 1e3:.1f} | {taken / 1e6:,.0f} |")
    return lines


def seconds(attend: Attend, heads: int, kv_heads: int, size: int, lengths: Sequence[int]) -> tuple[float, float]:
    """Return the CPU seconds of a forward, and of a forward and its backward."""
    shapes = [(1, sum(lengths), count, size) for count in (heads, kv_heads, kv_heads, heads)]
    *tensors, grad = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    inputs = [tensor.transpose(1, 2).requires_grad_() for tensor in tensors]
    started = time.process_time()
    output = attend(*inputs, lengths)
    forward = time.process_time() - started
    torch.autograd.grad(output, inputs, grad)
    return forward, time.process_time() - started


def measure_lengths(attend: Attend) -> Any:
    """Return the median CPU seconds of early and of late calls, and the bytes that resident memory grew by."""
    generator = random.Random(0)
    seconds(attend, 9, 3, 64, [32])  # imports, and what every size needs
    before, measured = resident("VmRSS"), []
    for _ in range(60):
        lengths: list[int] = []
        while sum(lengths) < TOKENS:
            lengths.append(generator.randint(15, 220))
        measured.append(seconds(attend, 9, 3, 64, lengths)[1])
    return sorted(measured[1:20])[9], sorted(measured[-20:])[10], resident("VmRSS") - before


if __name__ == "__main__":
    main()
