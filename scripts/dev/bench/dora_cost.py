"""Measure what a training step with DoRA costs over one with LoRA, where products dominate.

Both train in one process on the same base, in turns in the order A B B A, and CPU seconds are compared.

    python -m scripts.dev.bench.dora_cost --out docs/benchmarks/methods.md
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from scripts.dev.bench.common import append, build_qlora, heading, make_base
from scripts.dev.bench.methods import TITLE
from scripts.dev.bench.train_step import qlora_steps

ORDER = ("lora", "dora", "dora", "lora")


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model; its inner width is 2.75 times it")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", nargs="+", default=["none", "full"])
    parser.add_argument("--rounds", type=int, default=3, help="number of times that the order is repeated")
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    arguments.steps = 2 * arguments.rounds + 1
    torch.set_num_threads(1)
    sizes = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden * 11 // 4,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "num_key_value_heads": arguments.hidden // 128,
        "vocab_size": 1000,
    }
    lines = [
        *heading("cost of a step with DoRA over one with LoRA", "torch", "bitsandbytes"),
        "`python -m scripts.dev.bench.dora_cost`. A random Llama in bf16 on NF4, one thread: CPU seconds of a step",
        f"with its optimizer, medians of {2 * arguments.rounds} each in the order A B B A after one to warm up.",
        f"{arguments.layers} layers × {arguments.hidden} features, {arguments.batch} × {arguments.seq_len} tokens, "
        f"rank {arguments.rank}.",
        "",
        "| recompute | LoRA | DoRA | ratio of medians | ratios of rounds |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), sizes)
        lines += [row(arguments, folder, level) for level in arguments.recompute]
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def row(arguments: argparse.Namespace, base: str, level: str) -> str:
    """Return a line of the table."""
    steps: dict[str, Any] = {}
    for kind in ("lora", "dora"):
        model, _ = build_qlora(base, arguments.rank, 2 * arguments.rank, level, kind=kind)
        _, steps[kind] = qlora_steps(model, arguments)
        steps[kind](1, lambda _: True)
    seconds: dict[str, list[float]] = {"lora": [], "dora": []}
    for _ in range(arguments.rounds):
        for kind in ORDER:
            started = time.process_time()
            steps[kind](1, lambda _: True)
            seconds[kind].append(time.process_time() - started)
    lora, dora = (statistics.median(seconds[kind]) for kind in ("lora", "dora"))
    pairs = [
        sum(seconds["dora"][first : first + 2]) / sum(seconds["lora"][first : first + 2])
        for first in range(0, 2 * arguments.rounds, 2)
    ]
    return f"| {level} | {lora:.2f} s | {dora:.2f} s | {dora / lora:.3f} | {', '.join(f'{one:.3f}' for one in pairs)} |"


if __name__ == "__main__":
    main()
