"""Measure head and cross-entropy: in chunks, as training computes them, and with all logits at once.

Forward and backward of the loss over random hidden states, by chunk size; time, and on a GPU peak memory.

    python -m scripts.dev.bench.loss --out docs/benchmarks/loss.md
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from qlora.kernels import linear_cross_entropy
from qlora.kernels.head import default_chunk
from scripts.dev.bench.common import SHAPES, append, heading

TITLE = """# Head and cross-entropy

`python -m scripts.dev.bench.loss --out docs/benchmarks/loss.md`. The loss of random hidden states in bf16 with
random labels, and the gradient of the hidden states, with a frozen head. `all at once` is a model of transformers:
logits in bf16, a copy in fp32, torch's cross-entropy. The lower bound is the two products with the head. Times are the
minimum of rounds, in which the variants take turns; on a GPU, peak memory is above the inputs.
"""


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b" if on_gpu else "limits", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=16_384 if on_gpu else 1024)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    lines = table(arguments.shape, arguments.tokens, arguments.rounds)
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def table(shape: str, tokens: int, rounds: int) -> list[str]:
    """Return a line for every way to compute the loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features, vocabulary = SHAPES[shape]["hidden_size"], SHAPES[shape]["vocab_size"]
    hidden = torch.randn(tokens, features, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, features, device=device, dtype=torch.bfloat16).mul_(features**-0.5)
    labels = torch.randint(vocabulary, (tokens,), device=device)

    def chunked(elements: int) -> Callable[[], torch.Tensor]:
        return lambda: linear_cross_entropy(hidden, weight, labels, chunk_elements=elements)

    def at_once() -> torch.Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    used = default_chunk(device, vocabulary, torch.bfloat16)
    ways = {f"chunks of {used >> shift:,} logits": chunked(used >> shift) for shift in (3, 2, 1)}
    ways[f"chunks of {used:,} logits, the default"] = chunked(used)
    ways |= {f"chunks of {used << shift:,} logits": chunked(used << shift) for shift in (1, 2)}
    ways["all at once"] = at_once
    logits, products = torch.empty(tokens, vocabulary, device=device, dtype=torch.bfloat16), hidden.detach().clone()

    def multiply() -> None:
        torch.mm(products, weight.T, out=logits)
        torch.mm(logits, weight, out=products)

    bound = min(seconds(multiply, device) for _ in range(rounds))
    shortest, peaks = dict.fromkeys(ways, float("inf")), {}
    for _ in range(rounds):
        for name, loss in ways.items():
            if device.type == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            shortest[name] = min(shortest[name], seconds(lambda loss=loss: torch.autograd.grad(loss(), hidden), device))
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() - before
    columns = {
        "way": list(ways),
        "ms": [f"{best * 1e3:.1f}" for best in shortest.values()],
        "of the two products": [f"{best / bound:.2f}" for best in shortest.values()],
    }
    if peaks:
        columns["peak MB"] = [f"{peak / 1e6:.0f}" for peak in peaks.values()]
    return [
        *heading(f"{shape}, {tokens:,} tokens of {features} features, {vocabulary:,} words", "torch"),
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)),
    ]


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
