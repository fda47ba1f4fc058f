"""Measure that an overfitting run stops early and releases its best checkpoint.

python -m scripts.dev.bench.early_stopping --out docs/benchmarks/early_stopping.md
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import merge, train, verify
from qlora.checkpoint import RunDirectory
from scripts.dev.bench.common import REALDATA, append, heading

ABOUT = """`python -m scripts.dev.bench.early_stopping --out docs/benchmarks/early_stopping.md`. stories260K-hf, a real
Llama of 260,032 parameters, in NF4, sees {train:,} characters of tinyshakespeare again and again: rank 32, alpha 64,
steps of 4 × 128 tokens, learning rate {rate:g}, constant. The loss is measured every {every} steps on {held:,} later
characters, in nats per token. The merged models, in fp32, are evaluated by transformers alone.
"""
TRAIN_CHARACTERS, EVAL_CHARACTERS = 12_000, 8_000
STEPS, EVERY, RATE, PATIENCE, LENGTH = 200, 10, 5e-3, 3, 128


def main() -> None:
    """Train with and without early stopping, release both ways, and append a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown file to append to; default: print")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder))
    about = ABOUT.format(train=TRAIN_CHARACTERS, held=EVAL_CHARACTERS, rate=RATE, every=EVERY)
    lines = [*heading("An overfitting run", "torch", "transformers", "bitsandbytes"), about, *lines]
    if arguments.out is None:
        print("\n".join(lines))
    else:
        append(arguments.out, "# Early stopping\n", lines)


def measure(folder: Path) -> list[str]:
    """Return a table of the runs' steps and losses, and of their releases."""
    text = (REALDATA / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    parts = {"train": text[:TRAIN_CHARACTERS], "eval": text[TRAIN_CHARACTERS:][:EVAL_CHARACTERS]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": part}) + "\n", encoding="utf-8")
    table = [
        "| run | last step | held-out loss | best step | held-out loss | released step | loss of the merged model |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stopping in (("to its end", {}), (f"patience {PATIENCE}", {"early_stopping": {"patience": PATIENCE}})):
        run = folder / name.replace(" ", "-")
        result = train(config(folder, run, stopping))
        assert result.best is not None
        losses = result.eval_losses
        for which in ("best", "last"):
            adapter = run if which == "best" else RunDirectory(run).choose("last")
            merged = folder / f"{run.name}-{which}"
            report = merge(adapter, merged, "float32")
            assert verify(adapter, merged).matches
            table.append(
                f"| {name}{'' if which == 'best' else ', --checkpoint last'} | {result.steps} | "
                f"{losses[result.steps]:.4f} | {result.best.step} | {result.best.value:.4f} | {report.step} | "
                f"{loss_of(merged, parts['eval']):.4f} |"
            )
    table.append(f"\nBefore training, the held-out loss is {losses[0]:.4f}.")
    return table


def config(folder: Path, run: Path, stopping: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a run."""
    return {
        "model": {"base": str(REALDATA / "models" / "stories260K-hf"), "recompute": "none", "compute_dtype": "float32"},
        "lora": {"rank": 32, "alpha": 64},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_seq_len": LENGTH,
            "overlong": "split",
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            "output_dir": str(run),
            "max_steps": STEPS,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": RATE,
            "lr_scheduler": "constant",
            "eval_every": EVERY,
            "keep_best": True,
            **stopping,
        },
    }


@torch.no_grad()
def loss_of(folder: Path, text: str) -> float:
    """Return a model's mean loss per token on a text, in pieces as qlora splits it, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    total, count = 0.0, 0
    for start in range(0, len(ids), LENGTH):
        piece = torch.tensor([ids[start : start + LENGTH]])
        if piece.shape[1] > 1:
            total += model(input_ids=piece, labels=piece).loss.item() * (piece.shape[1] - 1)
            count += piece.shape[1] - 1
    return total / count


if __name__ == "__main__":
    main()
