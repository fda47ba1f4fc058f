"""Measure how the costs of training grow: with tokens, rank, layers, vocabulary, adapted layers and rows of data.

One size of a small random Llama is changed at a time. A step's CPU seconds on one thread are the least of a few; the
bytes that autograd saves for its backward are counted. An exponent is the slope of a straight line through the
logarithms: 1 is linear. Fixed costs lower it at small sizes, so that of the largest two sizes is given too. A table
is appended to `--out`.

    python -m scripts.dev.bench.growth --out docs/benchmarks/growth.md
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.dev.bench.common import append, heading, make_base, random_rows
from scripts.dev.bench.counts import held_for_backward

TITLE = """# How costs grow

`python -m scripts.dev.bench.growth`: one size of a small random Llama is changed at a time, with the others as in the
title. CPU seconds are those of the fastest of three steps, forward, backward and update, on one thread. Saved bytes are
what autograd keeps for the backward, counted. An exponent of 1 is linear; the first is of all sizes, the second of the
largest two, where fixed costs weigh least.
"""
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
RANK, LENGTH, STEPS = 16, 512, 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Cost = tuple[float, int]


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="largest number of rows of data")
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [10**power for power in range(3, 9) if 10**power <= arguments.rows]
    subjects: dict[str, tuple[list[int], Callable[[int], Cost]]] = {
        f"tokens of a step, in sequences of {LENGTH}": (
            [512 << n for n in range(5)],
            lambda size: step_cost(batch=size // LENGTH),
        ),
        "tokens of one sequence": ([512 << n for n in range(5)], lambda size: step_cost(length=size)),
        "rank": ([8 << n for n in range(6)], lambda size: step_cost(rank=size)),
        "layers": ([2 << n for n in range(5)], lambda size: step_cost(num_hidden_layers=size)),
        "vocabulary": ([2048 << n for n in range(7)], lambda size: step_cost(vocab_size=size)),
        "adapted linear layers of each layer": ([1, 2, 4, 7], lambda size: step_cost(targets=TARGETS[:size])),
        "rows of data, tokenized and packed": (rows, data_cost),
    }
    sizes = ", ".join(f"{name} {value}" for name, value in SIZES.items())
    lines = [
        *heading(f"rank {RANK}, {LENGTH} tokens, {sizes}", "torch", "transformers", "bitsandbytes"),
        "| what grows | sizes | CPU seconds | exponents | saved MB | exponents |",
        "|---|---|---|---|---|---|",
    ]
    for name, (values, measure) in subjects.items():
        costs = [measure(value) for value in values]
        cells = [", ".join(f"{value:,}" for value in values)]
        for part, unit, form in ((0, 1.0, "{:.3g}"), (1, 1e6, "{:.1f}")):
            found = [cost[part] / unit for cost in costs]
            is_counted = all(found)
            cells.append(", ".join(form.format(value) for value in found) if is_counted else "")
            cells.append(f"{slope(values, found):.2f}, {slope(values[-2:], found[-2:]):.2f}" if is_counted else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.out:
        append(arguments.out, TITLE, lines)


def slope(sizes: list[int], costs: list[float]) -> float:
    """Return the exponent of the power of the sizes that is nearest to the costs."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def step_cost(
    batch: int = 1, length: int = LENGTH, rank: int = RANK, targets: str | list[str] = "all-linear", **sizes: int
) -> Cost:
    """Return the CPU seconds of a training step, and the bytes that are saved for its backward."""
    from qlora.data import collate, make_example
    from qlora.layers import apply_recompute, rebuild_activations, use_document_attention
    from qlora.lora import add_lora
    from qlora.model import load_base, supervised_loss
    from qlora.optim import FlatParameters, make_optimizer

    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), SIZES | sizes)
        model, _ = load_base(folder, compute_dtype="bfloat16", device="cpu")
    add_lora(model, rank=rank, targets=targets)
    use_document_attention(model)
    rebuild_activations(model)
    apply_recompute(model, "none")
    model.train()
    flat = FlatParameters((name, each) for name, each in model.named_parameters() if each.requires_grad)
    optimizer = make_optimizer("adamw_32bit", flat)
    rows = random_rows(batch, length, model.config.vocab_size)
    examples = collate([make_example(row, [True] * length) for row in rows])

    def loss() -> torch.Tensor:
        computed: torch.Tensor = supervised_loss(model, examples) / examples.num_supervised
        return computed

    saved = held_for_backward(loss, model).saved
    seconds = []
    for _ in range(STEPS + 1):
        started = time.process_time()
        flat.zero_grad()
        loss().backward()
        flat.clip_grad_norm(1.0)
        optimizer.step(1e-4)
        seconds.append(time.process_time() - started)
    return min(seconds[1:]), saved


def data_cost(num_rows: int) -> Cost:
    """Return the CPU seconds of reading, tokenizing and packing rows, processes included; nothing is saved for it."""
    from transformers import AutoTokenizer

    from qlora.data import BatchPlan, EncodeOptions, Source, build_datasets
    from scripts.dev.bench.common import TOKENIZER
    from scripts.dev.bench.tokenizing import cpu_seconds

    generator = np.random.default_rng(0)
    words = [f"word{number}" for number in range(1000)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(num_rows):
                text = " ".join(words[index] for index in generator.integers(0, len(words), 24))
                file.write(json.dumps({"text": text}) + "\n")
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        started = cpu_seconds()
        options = EncodeOptions(max_seq_len=LENGTH)
        datasets = build_datasets(tokenizer, [Source(str(path))], 0.0, options, cache_dir=folder)
        BatchPlan(datasets.train.lengths, 4, 1, LENGTH).window(0)
        return cpu_seconds() - started, 0


if __name__ == "__main__":
    main()
