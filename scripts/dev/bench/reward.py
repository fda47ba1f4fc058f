"""Measure how often a reward model prefers the chosen answer of held-out pairs, before and after training.

The accuracy is computed by the run, and again from the merged folder by transformers alone.

    python -m scripts.dev.bench.reward --out docs/benchmarks/reward.md
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import qlora
from scripts.dev.bench.common import REALDATA, append, heading

TITLE = """# Reward models
"""
MODEL = REALDATA / "models" / "stories260K-hf"
PAIRS = REALDATA / "data" / "llms_from_scratch" / "instruction-data-with-preference.json"
SEEDS = (0, 1, 2)
TASK = """`python -m scripts.dev.bench.reward --out docs/benchmarks/reward.md`. stories260K-hf, a real Llama of 260,032
parameters, in NF4 with double quantization, with a head of one score drawn from the seed; 1,100 pairs of a polite and
a rude answer (LLMs from scratch), of which a fifth is held out by the seed. Rank 8, alpha 16, all linear layers, two
epochs of packed rows of 4 × 2 × 512 tokens, learning rate 0.003 with a cosine, 8-bit AdamW, factors and head in bf16.
"The shorter answer" is the accuracy of preferring it, for comparison."""


def config_of(seed: int, output_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a run's config."""
    return {
        "model": {"base": str(MODEL)},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"train": str(PAIRS), "eval": 0.2, "max_seq_len": 512},
        "train": {
            "objective": "reward",
            "output_dir": str(output_dir),
            "epochs": 2,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-3,
            "eval_every": 1.0,
            "save_every": None,
            "seed": seed,
        },
    }


def score_alone(folder: Path, documents: list[list[int]]) -> list[float]:
    """Return the scores that transformers alone gives documents of token ids, with a merged folder."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits.item() for ids in documents]


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Train and merge a run, and return what a line of the table has."""
    from qlora.checkpoint import RunDirectory
    from qlora.export.held_out import held_out_examples
    from qlora.model import load_run_tokenizer

    config = config_of(seed, folder / "run")
    qlora.train(config)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "eval_loss" in line]
    qlora.merge(folder / "run", folder / "merged", dtype="bfloat16")
    run = RunDirectory.open(folder / "run")
    examples = held_out_examples(run, load_run_tokenizer(run))
    documents = [example.input_ids.tolist() for example in examples]
    scores = score_alone(folder / "merged", documents)
    pairs = list(zip(scores[::2], scores[1::2], strict=True))
    lengths = list(zip(map(len, documents[::2]), map(len, documents[1::2]), strict=True))
    return {
        "before": first["eval_reward_accuracy"],
        "loss before": first["eval_loss"],
        "after": last["eval_reward_accuracy"],
        "loss after": last["eval_loss"],
        "merged": sum(chosen > rejected for chosen, rejected in pairs) / len(pairs),
        "shorter": sum((chosen < rejected) + 0.5 * (chosen == rejected) for chosen, rejected in lengths) / len(pairs),
        "pairs": len(pairs),
    }


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="page to append the table to; default: the screen")
    arguments = parser.parse_args()
    results = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(seed, Path(folder)))
            print(seed, results[-1], flush=True)
    columns = ("before", "after", "merged", "shorter", "loss before", "loss after")
    rows = [
        [str(seed), *(f"{result[name]:.3f}" for name in columns)] for seed, result in zip(SEEDS, results, strict=True)
    ]
    rows.append(["mean", *(f"{statistics.mean(result[name] for result in results):.3f}" for name in columns)])
    head = ["seed", "accuracy before", "after", "merged in bf16, by transformers", "the shorter answer", *columns[4:]]
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    about = heading("held-out accuracy on preferences", "torch", "transformers", "bitsandbytes")
    if arguments.out is None:
        print("\n".join([*about, *TASK.splitlines(), "", *lines]))
    else:
        append(arguments.out, TITLE, [*about, *TASK.splitlines(), "", *lines])


if __name__ == "__main__":
    main()
