"""Train the same batches with qlora and with PEFT + bitsandbytes, and compare loss and time.

Each runs in a process of its own, in the order A B B A, on the same tokens, seed, rank and learning rate, without
recomputation and with it. A table is appended to docs/benchmarks/beside_peft.md.

    python -m scripts.dev.bench.beside_peft --base FOLDER --text FILE
    python -m scripts.dev.bench.beside_peft --seeds 8

With `--seeds`, both train once from each seed, which draws the initial values and the order of the batches, and the
difference of their held-out losses is tested by Student's t of the pairs.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from scripts.dev.bench.common import BENCHMARKS, REALDATA, append, build_peft, build_qlora, heading, run_child

TARGET = BENCHMARKS / "beside_peft.md"
TITLE = """# qlora and PEFT + bitsandbytes

The same batches, seed, rank and learning rate, each run in its own process in the order A B B A:
`python -m scripts.dev.bench.beside_peft`.
"""
ORDER = ("qlora", "peft", "peft", "qlora")


def main() -> None:
    """Measure, print and append the table; with --trainer, be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(REALDATA / "models" / "stories260K-hf"))
    parser.add_argument("--text", default=str(REALDATA / "data" / "tinyshakespeare" / "input.txt"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=0, help="compare the losses of this many seeds, without timing")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--trainer", choices=["qlora", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--recompute", choices=["none", "full"], default="none", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trainer:
        print(json.dumps(measure(arguments)))
        return
    lines = table_of_seeds(arguments) if arguments.seeds else table(arguments)
    print("\n".join(lines))
    append(TARGET, TITLE, lines)


def title_of(arguments: argparse.Namespace) -> str:
    """Return what is trained."""
    size = f"{arguments.steps} steps of {arguments.batch} × {arguments.seq_len} tokens"
    return f"{Path(arguments.base).name}, {size}, rank 8, alpha 16, lr {arguments.learning_rate:g}"


def table_of_seeds(arguments: argparse.Namespace) -> list[str]:
    """Run both trainers once with each seed, and compare their held-out losses."""
    lines = [
        *heading(f"{title_of(arguments)}, {arguments.seeds} seeds", "torch", "bitsandbytes", "transformers", "peft"),
        "| seed | held-out loss before | qlora after | PEFT after | difference |",
        "|---|---|---|---|---|",
    ]
    differences = []
    for seed in range(arguments.seeds):
        given = [*sys.argv[1:], "--seed", str(seed), "--trainer"]
        ours, theirs = (run_child(__spec__.name, *given, trainer) for trainer in ("qlora", "peft"))
        differences.append(ours["after"] - theirs["after"])
        cells = f"{ours['before']:.4f} | {ours['after']:.4f} | {theirs['after']:.4f} | {differences[-1]:+.4f}"
        lines.append(f"| {seed} | {cells} |")
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    lines += ["", f"Mean difference {mean:+.4f} ± {error:.4f} (standard error); t = {mean / error:.2f}."]
    return lines


def table(arguments: argparse.Namespace) -> list[str]:
    """Run both trainers twice at each level of recomputation."""
    lines = [
        *heading(title_of(arguments), "torch", "bitsandbytes", "transformers", "peft"),
        "| recompute | trainer | held-out loss before | after | seconds of training (two runs) |",
        "|---|---|---|---|---|",
    ]
    for recompute in ("none", "full"):
        results: dict[str, list[dict[str, Any]]] = {"qlora": [], "peft": []}
        for trainer in ORDER:
            given = [*sys.argv[1:], "--trainer", trainer, "--recompute", recompute]
            results[trainer].append(run_child(__spec__.name, *given))
        for trainer, runs in results.items():
            seconds = ", ".join(f"{run['seconds']:.1f}" for run in runs)
            lines.append(f"| {recompute} | {trainer} | {runs[0]['before']:.4f} | {runs[0]['after']:.4f} | {seconds} |")
        best = {trainer: min(run["seconds"] for run in runs) for trainer, runs in results.items()}
        lines.append(f"| {recompute} | PEFT's time ÷ ours | | | {best['peft'] / best['qlora']:.2f} |")
    return lines


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Train with one of the two, on batches made by the same code."""
    import torch

    from qlora.data import BatchPlan, EncodeOptions, Source, build_datasets, collate, eval_batches
    from qlora.model import evaluate

    build, train = SIDES[arguments.trainer]
    model, tokenizer = build(arguments.base, 8, 16, arguments.recompute, seed=arguments.seed)
    datasets = build_datasets(
        tokenizer, [Source(arguments.text)], 0.02, EncodeOptions(max_seq_len=arguments.seq_len, overlong="split")
    )
    plan = BatchPlan(datasets.train.lengths, arguments.batch, 1, seed=arguments.seed)
    batches = [collate([datasets.train[index] for index in plan.window(step)]) for step in range(arguments.steps)]
    unwrapped = model.base_model.model if arguments.trainer == "peft" else model
    before = evaluate(unwrapped, eval_batches(datasets.eval, arguments.batch)).loss
    model.train()
    started = time.perf_counter()
    train(model, batches, arguments.learning_rate)
    seconds = time.perf_counter() - started
    assert torch.isfinite(torch.tensor(before))
    return {
        "before": before,
        "after": evaluate(unwrapped, eval_batches(datasets.eval, arguments.batch)).loss,
        "seconds": seconds,
    }


def train_qlora(model: Any, batches: list[Any], learning_rate: float) -> None:
    """Measure steps of qlora."""
    from qlora.model import supervised_loss
    from qlora.optim import FlatParameters, make_optimizer

    flat = FlatParameters((name, p) for name, p in model.named_parameters() if p.requires_grad)
    optimizer = make_optimizer("adamw_32bit", flat)
    for batch in batches:
        flat.zero_grad()
        (supervised_loss(model, batch) / batch.num_supervised).backward()
        flat.clip_grad_norm(1.0)
        optimizer.step(learning_rate)


def train_peft(model: Any, batches: list[Any], learning_rate: float) -> None:
    """Measure steps as transformers' trainer makes them."""
    import torch
    import torch.nn.functional as F

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), batch.labels.view(-1), reduction="sum")
        (loss / batch.num_supervised).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


SIDES = {"qlora": (build_qlora, train_qlora), "peft": (build_peft, train_peft)}

if __name__ == "__main__":
    main()
