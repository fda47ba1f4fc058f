"""Measure the number of tokens from which a LoRA linear is faster folded than in two products.

For the linears of a shape, the time of forward and backward in the form `separate` over that in `folded` at each
number of tokens, both in turn in one process. `FOLD_FROM_TOKENS` in qlora/lora/function.py is read off this table.

    python -m scripts.dev.bench.forms --out docs/benchmarks/forms.md
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from qlora.lora import AdapterSpec, LoraLinear
from qlora.nf4 import NF4Linear
from scripts.dev.bench.common import SHAPES, append, heading

TITLE = """# The two forms of a LoRA linear

`python -m scripts.dev.bench.forms --out docs/benchmarks/forms.md`. Forward and backward of a layer in bf16 whose input
needs a gradient: the time of two products, x Wᵀ and then + scaling · (x Aᵀ) Bᵀ, over the time of one product with
W + scaling · B A. Above 1, folding is faster. `held` layers cache their dequantized weight. Times are the minimum of
rounds, in which the forms take turns.
"""
TOKENS = (256, 512, 1024, 2048, 4096, 8192)


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b" if torch.cuda.is_available() else "limits", choices=SHAPES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    lines = [
        *heading(f"{arguments.shape}, rank {arguments.rank}", "torch", "triton", "bitsandbytes"),
        f"| in → out | weight | {' | '.join(f'{tokens:,}' for tokens in TOKENS)} |",
        f"|---|---|{'---|' * len(TOKENS)}",
    ]
    sizes = SHAPES[arguments.shape]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    for width, out in ((hidden, hidden), (hidden, inner), (inner, hidden)):
        for is_cached in (False, True):
            layer = make_layer(width, out, arguments.rank, is_cached)
            ratios = " | ".join(f"{ratio(layer, tokens, arguments.rounds):.2f}" for tokens in TOKENS)
            lines.append(f"| {width} → {out} | {'held' if is_cached else 'dequantized'} | {ratios} |")
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def make_layer(width: int, out: int, rank: int, is_cached: bool) -> LoraLinear:
    """Return a layer as it is during training, with B above zero."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = NF4Linear.from_linear(torch.nn.Linear(width, out, bias=False, device=device, dtype=torch.bfloat16))
    layer = LoraLinear(base, AdapterSpec(rank, 2 * rank))
    layer.reset(torch.Generator().manual_seed(0))
    layer.lora_B.data.normal_(std=0.01)
    if is_cached:
        base.cache_weight(torch.bfloat16)
    return layer


def ratio(layer: LoraLinear, tokens: int, rounds: int) -> float:
    """Return the time of two products over that of one."""
    device = layer.lora_A.device
    x = torch.randn(tokens, layer.in_features, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, layer.out_features, device=device, dtype=torch.bfloat16)

    def run(form: str) -> None:
        layer.spec = replace(layer.spec, form=form)
        torch.autograd.grad(layer(x), (x, layer.lora_A, layer.lora_B), grad)

    best = {"separate": float("inf"), "folded": float("inf")}
    for _ in range(rounds + 2):  # the first two warm up: their times are above the minimum
        for form, shortest in best.items():
            best[form] = min(shortest, seconds(lambda form=form: run(form), device))
    return best["separate"] / best["folded"]


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of a call; on a GPU of ten in a row, so that launches do not count."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(10):
        function()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e4


if __name__ == "__main__":
    main()
