"""Measure how close initial values bring a model in 4 bits to its 16-bit original, before any training.

The KL divergence of the original model's predictions from those of the 4-bit weights with the initial adapter, by
start, second moment, iterations and rank; and the accuracy of the singular vectors of large matrices.

    python -m scripts.dev.bench.initial_values --out docs/benchmarks/methods.md
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from qlora.lora.initial import truncated_svd
from qlora.lora.reconstruction import STARTS, reconstruct, subtract
from qlora.lora.statistics import InputObserver, InputStatistics
from qlora.nf4 import dequantize, quantize
from scripts.dev.bench.common import REALDATA, append, heading

TITLE = """# Initial values and methods of training
"""
ABOUT = """`python -m scripts.dev.bench.initial_values --out docs/benchmarks/methods.md`. A real model of 260,032
parameters and 35 adapted layers of 64 to 172 features, on text like that it was trained on: KL divergence per token, in
nats, of the model's predictions from those of NF4 weights (double quantization, dequantized to bf16) with their initial
adapter in bf16, computed in fp32. Inputs are observed on one half of the documents and the divergence is measured on
the other half, both ways round, {tokens:,} tokens in all. `sketch` keeps {sketch} directions of each layer's inputs.
"""
RANKS = (1, 2, 4, 8, 16)
SKETCH = 16
SCALING = 2.0
Moment = Callable[[InputStatistics], torch.Tensor | None]
# How many directions are kept, and what of them is used.
MOMENTS: dict[str, tuple[int, Moment]] = {
    "none": (0, lambda statistics: None),
    "diagonal": (0, lambda statistics: statistics.mean_square),
    "sketch": (SKETCH, lambda statistics: statistics.second_moment()),
    "full": (1 << 20, lambda statistics: statistics.second_moment()),
}


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the large matrices")
    parser.add_argument("--out", type=Path, help="page that the tables are appended to")
    arguments = parser.parse_args()
    lines = [*divergences(arguments.iterations), "", *singular_vectors(arguments.size)]
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def divergences(iterations: Sequence[int]) -> list[str]:
    """Return a line for every way to choose the initial values."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = REALDATA / "models" / "stories260K-hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (REALDATA / "tokenizers" / "cs336_tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = filter(None, map(str.strip, text.split("<|endoftext|>")))
    documents = [torch.tensor([tokenizer(story).input_ids[:512]]) for story in stories]
    halves = documents[::2], documents[1::2]
    folds = [Fold(model, *halves), Fold(model, *reversed(halves))]
    tokens = sum(document.numel() for document in documents)

    def mean(choose: Callable[..., torch.Tensor]) -> float:
        return sum(fold.divergence(choose) for fold in folds) / tokens

    plain = mean(lambda fold, name: nf4(fold.weights[name]))
    lines = [
        *heading("divergence from the original before training", "torch", "transformers", "bitsandbytes"),
        *ABOUT.format(tokens=tokens, sketch=SKETCH).splitlines(),
        "",
        f"| start | second moment | iterations | {' | '.join(f'rank {rank}' for rank in RANKS)} |",
        f"|---|---|---|{'---|' * len(RANKS)}",
        f"| B = 0 | | |{f' {plain:.4f} |' * len(RANKS)}",
    ]
    for start, moment, count in product(STARTS, MOMENTS, iterations):
        found = [
            mean(partial(Fold.reconstructed, rank=rank, start=start, moment=moment, iterations=count)) for rank in RANKS
        ]
        lines.append(f"| {start} | {moment} | {count} | {' | '.join(f'{value:.4f}' for value in found)} |")
    return lines


def nf4(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix as a run computes with it, in fp32."""
    return dequantize(*quantize(matrix), torch.bfloat16).float()


class Fold:
    """A model whose inputs are observed on some documents, and whose predictions are compared on others."""

    def __init__(self, model: Any, observed: Sequence[torch.Tensor], compared: Sequence[torch.Tensor]) -> None:
        self.model, self.compared = model, compared
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
        }
        self.weights = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.statistics = {directions: self._observe(observed, directions) for directions, _ in MOMENTS.values()}
        self.original = list(self._predictions())

    def divergence(self, choose: Callable[..., torch.Tensor]) -> float:
        """Return the sum over tokens of the divergence with other weights."""
        for name, layer in self.layers.items():
            layer.weight.data = choose(self, name)
        total = 0.0
        for wanted, found in zip(self.original, self._predictions(), strict=True):
            total += (wanted.exp() * (wanted - found)).sum().item()
        for name, layer in self.layers.items():
            layer.weight.data = self.weights[name]
        return total

    def reconstructed(self, name: str, rank: int, start: str, moment: str, iterations: int) -> torch.Tensor:
        """Return a layer's effective weight before training."""
        directions, choose = MOMENTS[moment]
        weight, second_moment = self.weights[name], choose(self.statistics[directions][name])
        found = reconstruct(weight, rank, SCALING, nf4, iterations=iterations, start=start, second_moment=second_moment)
        return subtract(nf4(subtract(weight, found.subtracted, SCALING)), found.initial, -SCALING)

    def _observe(self, documents: Sequence[torch.Tensor], directions: int) -> dict[str, InputStatistics]:
        with InputObserver(self.model, self.layers, directions) as observer, torch.inference_mode():
            for document in documents:
                self.model(document)
        return observer.statistics

    @torch.no_grad()
    def _predictions(self) -> Iterator[torch.Tensor]:
        for document in self.compared:
            yield torch.log_softmax(self.model(document).logits[0], -1)


def singular_vectors(size: int, rank: int = 16) -> list[str]:
    """Return a line for a matrix of noise and for one whose singular values fall."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=generator).mul_(size**-0.5)
    left, right = (torch.linalg.qr(torch.randn(size, 256, generator=generator)).Q for _ in range(2))
    falling = 0.5 * noise + (left * 3 * torch.arange(1, 257) ** -0.5) @ right.T
    lines = [
        *heading(f"{rank} singular vectors of {size} × {size} numbers", "torch"),
        "By subspace iterations, against all singular values; the remainder is ‖W − svd_r(W)‖. The first matrix is",
        "noise, as an error of quantization; of the other, 256 values lie above the noise and fall as 1 / √i.",
        "",
        "| matrix | seconds | seconds for all values | remainder ÷ smallest possible |",
        "|---|---|---|---|",
    ]
    for name, matrix in {"noise": noise, "falling": falling}.items():
        started = time.perf_counter()
        U, S, Vh = truncated_svd(matrix, rank)
        middle = time.perf_counter()
        values = torch.linalg.svdvals(matrix)
        ended = time.perf_counter()
        # Summed in fp64: a norm of millions of numbers in fp32 is off by more than what is measured.
        remainder, smallest = ((matrix - (U * S) @ Vh).double().norm(), values[rank:].double().norm())
        ratio = remainder / smallest
        lines.append(f"| {name} | {middle - started:.1f} | {ended - middle:.1f} | {ratio:.5f} |")
    return lines


if __name__ == "__main__":
    main()
