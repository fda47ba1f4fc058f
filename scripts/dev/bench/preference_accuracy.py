"""Measure how often a run prefers the chosen answer of held-out pairs, before and after DPO, beside TRL.

The same real pairs, prompt text, rank, learning rate and number of steps; each side tokenizes and batches them itself.
A table is appended to docs/benchmarks/preferences.md.

    python -m scripts.dev.bench.preference_accuracy
    python -m scripts.dev.bench.preference_accuracy --model DIR --pairs 300 --rate 2e-4 --epochs 1 --bf16
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import qlora
from scripts.dev.bench.common import BENCHMARKS, REALDATA, append, heading

TARGET = BENCHMARKS / "preferences.md"
TITLE = "# Preference objectives\n"
MODEL = REALDATA / "models" / "stories260K-hf"
DATA = {
    "llms_from_scratch": REALDATA / "data" / "llms_from_scratch" / "instruction-data-with-preference.json",
    "dpo_en_demo": REALDATA / "data" / "llama_factory_demo" / "dpo_en_demo.json",
}
PAIRS_PER_STEP, BETA, MAX_TOKENS = 8, 0.1, 512
# Writes turns as they are, so that both sides train on the same text.
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"


def main() -> None:
    """Measure, print and append the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", choices=DATA, action="append", help="pairs to train on; default: each in turn")
    parser.add_argument("--pairs", type=int, default=0, help="about this many pairs; 0 takes all")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=PAIRS_PER_STEP, help="pairs at a time, of 8 a step")
    parser.add_argument("--bf16", action="store_true", help="TRL's model in bf16 instead of fp32")
    arguments = parser.parse_args()
    defaults = vars(parser.parse_args([]))
    options = "".join(
        f" --{name.replace('_', '-')}{'' if value is True else f' {value}'}"
        for name, value in vars(arguments).items()
        if name not in ("model", "data") and value != defaults[name]
    )
    options = " --model DIR" * (arguments.model != MODEL) + options
    lines = [
        *heading("DPO on held-out pairs, compared with TRL", "torch", "transformers", "trl", "peft", "bitsandbytes"),
        f"`python -m scripts.dev.bench.preference_accuracy{options}`. {arguments.model.name}; a fifth of the pairs is",
        f"held out. Rank 8, alpha 16, all linear layers, β {BETA:g}, learning rate {arguments.rate:g} with a cosine,",
        f"{arguments.epochs} epochs of {PAIRS_PER_STEP} pairs a step. qlora on NF4, TRL's DPOTrainer with PEFT on the",
        f"weights in {'bf16' if arguments.bf16 else 'fp32'}. Equal rewards count one half here, and as wrong in TRL.",
        "",
        "| pairs | held out | side | accuracy before | after | loss before | after | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in arguments.data or DATA:
        with tempfile.TemporaryDirectory() as folder:
            train, held_out = split(DATA[name], Path(folder), arguments.pairs)
            for side, measure in {"qlora": measure_qlora, "TRL": measure_trl}.items():
                started = time.perf_counter()
                found = measure(arguments, train, held_out, Path(folder) / side)
                numbers = " | ".join(f"{number:.3f}" for number in found)
                seconds = time.perf_counter() - started
                lines.append(
                    f"| {name} | {len(held_out)} of {len(train) + len(held_out)} | {side} | {numbers} | {seconds:.0f} |"
                )
                print(lines[-1], flush=True)
    append(TARGET, TITLE, lines)


def split(path: Path, folder: Path, count: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return pairs to train on and held-out ones, about `count` in all, as a prompt and two answers."""
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        if "instruction" in row:
            prompt = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
            answers = {side: row[side] for side in ("chosen", "rejected")}
        else:
            prompt = "\n".join(turn["value"] for turn in row["conversations"])
            answers = {side: row[side]["value"] for side in ("chosen", "rejected")}
        # A token of the smallest model is about two characters.
        rows.append({"prompt": prompt[:200] + "\n", **{side: text[:500] for side, text in answers.items()}})
    rows = rows[:: max(1, round(len(rows) / count))] if count else rows
    held_out = rows[::5]
    train = [row for number, row in enumerate(rows) if number % 5]
    for name, part in {"train": train, "held_out": held_out}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (folder / "plain.jinja").write_text(PLAIN, encoding="utf-8")
    return train, held_out


def measure_qlora(
    arguments: argparse.Namespace, train: list[Any], held_out: list[Any], folder: Path
) -> tuple[float, float, float, float]:
    """Train with qlora; return accuracy before and after, and the losses."""
    data = folder.parent
    qlora.train(
        {
            "model": {"base": str(arguments.model)},
            "lora": {"rank": 8, "alpha": 16},
            "data": {
                "train": str(data / "train.jsonl"), "eval": str(data / "held_out.jsonl"), "max_seq_len": MAX_TOKENS,
                "overlong": "truncate", "packing": False, "chat_template": str(data / "plain.jinja"),
            },
            "train": {
                "objective": "dpo", "preference": {"beta": BETA}, "output_dir": str(folder), "epochs": arguments.epochs,
                "micro_batch_size": arguments.micro_batch, "learning_rate": arguments.rate,
                "gradient_accumulation_steps": PAIRS_PER_STEP // arguments.micro_batch,
                "max_grad_norm": 1.0, "eval_every": 1.0, "save_every": None,
            },
        }
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first, *_, last = [line for line in lines if "eval_loss" in line]
    accuracies = (each["eval_reward_accuracy"] for each in (first, last))
    return (*accuracies, first["eval_loss"], last["eval_loss"])  # type: ignore[return-value]


def measure_trl(
    arguments: argparse.Namespace, train: list[Any], held_out: list[Any], folder: Path
) -> tuple[float, float, float, float]:
    """Train with TRL; return accuracy before and after, and the losses. TRL counts ties as wrong, so before is 0."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype),
        args=DPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=arguments.bf16, report_to=[], beta=BETA,
            learning_rate=arguments.rate, num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.micro_batch, per_device_eval_batch_size=arguments.micro_batch,
            gradient_accumulation_steps=PAIRS_PER_STEP // arguments.micro_batch,
            lr_scheduler_type="cosine", warmup_steps=5, max_length=MAX_TOKENS, save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True, logging_strategy="no",
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    accuracies = (each["eval_rewards/accuracies"] for each in (before, after))
    return (*accuracies, before["eval_loss"], after["eval_loss"])  # type: ignore[return-value]


if __name__ == "__main__":
    main()
