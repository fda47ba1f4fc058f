"""Time of a layer of experts forward and backward on a CPU: one expert at a time, and in groups.

python -m scripts.dev.bench.expert_groups --out docs/benchmarks/moe.md

Every way of a size is timed in turn, forwards and then backwards, in one process with one thread.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from qlora.kernels import grouped
from qlora.lora.expert_products import ExpertProjection, expert_products
from qlora.nf4 import NF4Experts

INTRODUCTION = "# Mixtures of experts\n"
# (experts, experts per token, hidden size, expert size)
SIZES = [(64, 8, 128, 64), (32, 4, 512, 256), (16, 4, 1024, 768)]
TOKENS, RANK = 512, 2
# Bytes of weights in a group; with none, each expert is a group.
WAYS = {"one at a time": 0, "default": grouped.LOOP_BYTES, "16 MiB": 16 << 20}


class Layer:
    """A random layer of experts in 4 bits, with adapters, and a batch for it."""

    def __init__(self, num_experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.factors, self.parts = list[torch.Tensor](), list[ExpertProjection]()
        for out_features, in_features in ((2 * inner, hidden), (hidden, inner)):
            weights = NF4Experts.from_weight(draw(num_experts, out_features, in_features) * 0.02)
            self.parts.append(ExpertProjection(weights, None, False, 2.0))
            for shape in ((RANK, in_features), (out_features, RANK)):
                self.factors.append((draw(num_experts, *shape) * 0.1).to(dtype).requires_grad_())
        scores, self.index = draw(TOKENS, num_experts).softmax(1).topk(top_k)
        self.scores = scores.to(dtype).requires_grad_()
        self.x, self.grad = draw(TOKENS, hidden).to(dtype).requires_grad_(), draw(TOKENS, hidden).to(dtype)

    def step_seconds(self, num_bytes: int) -> float:
        """Return the processor's time of a forward and a backward with groups of so many bytes."""
        grouped.LOOP_BYTES = num_bytes
        start = time.process_time()
        expert_products(self.x, self.index, self.scores, *self.parts, self.gate, self.factors).backward(self.grad)
        return time.process_time() - start

    @staticmethod
    def gate(first: torch.Tensor) -> torch.Tensor:
        """Return what is between the two products."""
        gate, up = first.chunk(2, dim=-1)
        return F.silu(gate) * up


def main() -> None:
    """Time each size, print the table and append it to a page."""
    from scripts.dev.bench.common import append, heading

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4, help="steps of each way, in each direction")
    parser.add_argument("--out", type=Path, help="page to append to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = heading(f"a layer on a CPU, {TOKENS} tokens, one thread", "torch") + [
        "`python -m scripts.dev.bench.expert_groups --out docs/benchmarks/moe.md`.",
        "CPU milliseconds of forward and backward: minimum, median.",
        "",
        "| experts, experts per token, hidden size, expert size | dtype | " + " | ".join(WAYS) + " |",
        "|---|---|" + "---|" * len(WAYS),
    ]
    for sizes in SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            layer, seconds = Layer(*sizes, dtype), {name: list[float]() for name in WAYS}
            for number in WAYS.values():
                layer.step_seconds(number)
            for _ in range(arguments.repeats):
                for name in (*WAYS, *reversed(WAYS)):
                    seconds[name].append(layer.step_seconds(WAYS[name]))
            found = [f"{1e3 * min(each):.0f}, {1e3 * sorted(each)[len(each) // 2]:.0f}" for each in seconds.values()]
            lines.append(f"| {sizes} | {str(dtype).removeprefix('torch.')} | " + " | ".join(found) + " |")
            print(lines[-1], flush=True)
    if arguments.out:
        append(arguments.out, INTRODUCTION, lines)


if __name__ == "__main__":
    main()
