"""Measure the accuracy of classification before and after training, from the merged folder, and beside PEFT.

python -m scripts.dev.bench.classification --out docs/benchmarks/classification.md
python -m scripts.dev.bench.classification --task banking77 --by head --model DIR --rate 1e-3 --peft --out FILE
"""

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import qlora
from qlora.data.encode import ExampleEncoder
from qlora.data.examples import Labelled
from qlora.files import BaseFiles
from qlora.lora import stored_head
from qlora.model.labels import LABELS_FILE, read_labels
from qlora.model.predict import score_labels
from scripts.dev.bench.common import REALDATA, append, heading
from scripts.dev.bench.peft_classifier import measure_peft

TITLE = """# Classification
"""
# Names of the labels that the files give as numbers, in a model of words.
TREC_WORDS = {"0": "description", "1": "entity", "2": "abbreviation", "3": "human", "4": "number", "5": "location"}


def trec(part: str) -> list[dict[str, str]]:
    """Return the questions of TREC-6 with their labels."""
    lines = (REALDATA / "data" / "trec" / f"TREC.{part}.all").read_text(encoding="latin-1").splitlines()
    return [dict(zip(("label", "text"), line.split(" ", 1), strict=True)) for line in lines]


def banking77(part: str) -> list[dict[str, str]]:
    """Return the questions of banking77 with their labels."""
    with (REALDATA / "data" / "banking77" / f"{part}.csv").open(encoding="utf-8", newline="") as file:
        return [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]


TASKS = {"trec": trec, "banking77": banking77}


def write(path: Path, rows: Sequence[dict[str, str]]) -> str:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@torch.no_grad()
def by_transformers(folder: Path, rows: Sequence[dict[str, str]], dtype: torch.dtype) -> list[str]:
    """Predict the labels with transformers alone.

    By a head, the largest score; by words, the likeliest first token of the labels' words after the prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = json.loads((folder / LABELS_FILE).read_text(encoding="utf-8"))
    labels = given["labels"]
    if given["by"] == "head":
        scorer = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        scores = (scorer(**tokenizer(row["text"], return_tensors="pt")).logits[0] for row in rows)
        return [scorer.config.id2label[int(each.argmax())] for each in scores]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def prompt(text: str, answer: str = "") -> list[int]:
        turns = [{"role": "user", "content": text}]
        start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(start + answer, add_special_tokens=False).input_ids

    answers = [prompt("a", each["word"])[len(prompt("a")) :] for each in labels]
    common = next(place for place, tokens in enumerate(zip(*answers, strict=False)) if len(set(tokens)) > 1)
    tokens = [answer[common] for answer in answers]
    found = []
    for row in rows:
        ids = torch.tensor([prompt(row["text"]) + answers[0][:common]])
        found.append(labels[int(model(ids).logits[0, -1, tokens].argmax())]["name"])
    return found


def by_qlora(folder: Path, rows: Sequence[dict[str, str]], dtype: str) -> list[str]:
    """Predict the labels with qlora in a dtype, a text at a time, as transformers does."""
    labels, _ = read_labels(folder / LABELS_FILE)
    files = BaseFiles.resolve(str(folder))
    model, tokenizer = qlora.load_base(
        str(folder), quantization="none", compute_dtype=dtype, head=stored_head(files.config)
    )
    encoder = ExampleEncoder(tokenizer, labels=labels)
    assert encoder.labels is not None
    encoded = encoder.encode([Labelled(row["text"], labels.names[:1]) for row in rows])
    examples = [document for each in encoded for document in each.documents]
    scores = score_labels(model, examples, encoder.labels, batch_size=1)
    return [labels.names[number] for number in scores.argmax(dim=1).tolist()]


def accuracy(predicted: Sequence[str], rows: Sequence[dict[str, str]]) -> float:
    """Return the share of rows that are predicted right."""
    return sum(label == row["label"] for label, row in zip(predicted, rows, strict=True)) / len(rows)


def measure(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Train, and return the figures as the lines of a table."""
    wanted = {"train": arguments.rows, "test": arguments.test_rows or arguments.rows}
    rows = {part: TASKS[arguments.task](part) for part in wanted}
    rows = {part: own[:: max(1, len(own) // (wanted[part] or len(own)))] for part, own in rows.items()}
    paths = {part: write(folder / f"{part}.jsonl", values) for part, values in rows.items()}
    data: dict[str, Any] = {"train": paths["train"], "eval": paths["test"], "max_seq_len": 256, "overlong": "truncate"}
    if arguments.task == "trec" and arguments.words:
        data["labels"] = TREC_WORDS
    config = qlora.load_config(
        {
            "model": {"base": str(arguments.model)},
            "lora": {"rank": 8, "alpha": 16},
            "data": data | {"cache_dir": str(folder / "cache")},
            "train": {
                "objective": "classify",
                "classify_by": arguments.by,
                "optimizer": "adamw_32bit",
                "output_dir": str(folder / "run"),
                "epochs": arguments.epochs,
                "micro_batch_size": 1,
                "gradient_accumulation_steps": arguments.batch,
                "learning_rate": arguments.rate,
                "eval_every": None,
                "log_every": 20,
            },
        }
    )
    started = time.perf_counter()
    result = qlora.train(config, show_progress=True)
    seconds = time.perf_counter() - started
    run = qlora.evaluate(result.run_dir)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before = next(line for line in lines if "eval_accuracy" in line)
    merged = folder / "merged"
    qlora.merge(result.run_dir, merged, dtype="float32")
    counts = []
    for dtype in ("bfloat16", "float32"):
        ours, theirs = (
            by_qlora(merged, rows["test"], dtype),
            by_transformers(merged, rows["test"], getattr(torch, dtype)),
        )
        counts += [f"{accuracy(theirs, rows['test']):.1%}", str(sum(map(str.__ne__, ours, theirs)))]
    peft = f"{measure_peft(config):.1%}" if arguments.peft else ""
    cells = [
        Path(arguments.model).name, arguments.task, arguments.by, f"{len(rows['train']):,} / {len(rows['test']):,}",
        str(result.steps), f"{arguments.rate:g}", f"{before['eval_accuracy']:.1%}", f"{run.metrics['accuracy']:.1%}",
        f"{run.metrics['macro_f1']:.1%}", *counts, peft, f"{seconds:,.0f}",
    ]  # fmt: skip
    return ["| " + " | ".join(cells) + " |"]


TABLE = """| model | task | by | rows | steps | rate | before | after | macro F1 | merged, bf16 | different \
| merged, fp32 | different | PEFT | s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
TEXT = """`python -m scripts.dev.bench.classification{options}`. NF4 with double quantization, LoRA of rank 8 on all
linear layers, {batch} sequences of 256 tokens a step, AdamW in 32 bits. Accuracy on the test rows: before training,
after it, and by transformers alone with the merged folder, in bf16 and in fp32. "Different" is the number of test rows
that qlora predicts differently with the same folder and dtype. PEFT, on bitsandbytes' layers, was trained on the same
texts in the same steps at the same rate."""


def main() -> None:
    """Measure one model on one task, and append the figures to a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="trec")
    parser.add_argument("--model", type=Path, default=REALDATA / "models" / "stories260K-hf")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--rows", type=int, default=0, help="about this many rows of each part; 0 takes all")
    parser.add_argument("--test-rows", type=int, default=0, help="about this many rows of the test part instead")
    parser.add_argument("--by", choices=("tokens", "head"), default="tokens")
    parser.add_argument("--peft", action="store_true", help="train the same with PEFT")
    parser.add_argument("--words", action="store_true", help="words instead of TREC's numbers")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    given = {"task": arguments.task, "rate": arguments.rate, "epochs": arguments.epochs, "rows": arguments.rows}
    given |= {"batch": arguments.batch, "by": arguments.by}
    given |= {"test_rows": arguments.test_rows}
    options = "".join(
        f" --{name.replace('_', '-')} {value}" for name, value in given.items() if value != parser.get_default(name)
    )
    options += (
        " --model DIR" * (arguments.model != parser.get_default("model"))
        + " --words" * arguments.words
        + " --peft" * arguments.peft
    )
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(arguments, Path(folder))
    title = f"Accuracy of {arguments.model.name} on {arguments.task}"
    text = [
        *heading(title, "torch", "transformers", "bitsandbytes"),
        TEXT.format(options=options, batch=arguments.batch),
        "",
        TABLE,
        *lines,
    ]
    append(arguments.out, TITLE, text)


if __name__ == "__main__":
    main()
