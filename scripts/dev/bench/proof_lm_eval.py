"""Verify a release in lm-eval: adapter and merged model get the same scores on held-out real questions.

A small pretrained model is trained to name the kind of TREC's questions; lm-eval then puts the 500 test questions, as
multiple choice, to PEFT's adapter on the original base and to the merge onto it, and to the run itself and the merge
onto the dequantized base. All in fp32. With lm-eval and peft installed:

    python -m scripts.dev.bench.proof_lm_eval --out docs/benchmarks/release.md
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.dev.bench.common import REALDATA, append, heading
from scripts.dev.bench.proof_families import train_run

# Indexed by their numbers in the files.
KINDS = (" description", " entity", " abbreviation", " person", " place", " number")
QUESTION = "Question: {question}\nKind:"
TASK = "trec_kinds"
TRAIN = {"max_steps": 100, "learning_rate": 3e-3, "eval_every": 100, "save_every": 100}


@dataclass(frozen=True, slots=True)
class Score:
    """Scores of one model.

    Attributes:
        accuracy: Share of the questions whose right kind is the likeliest.
        log_likelihoods: Log-likelihood of every kind of every question, in their order.
    """

    accuracy: float
    log_likelihoods: list[float]


def write_rows(source: Path, target: Path) -> Path:
    """Write TREC's lines, a number and a question, as rows of prompt and completion."""
    lines = [line.partition(" ") for line in source.read_text(encoding="latin-1").splitlines()]
    rows = [
        {"prompt": QUESTION.format(question=question), "completion": KINDS[int(number)]}
        for number, _, question in lines
    ]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


def make_task(test: Path) -> dict[str, Any]:
    """Return the test questions as lm-eval's task."""
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(test)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": list(KINDS),
        "doc_to_target": lambda row: KINDS.index(row["completion"]),
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def score(task: dict[str, Any], **model: Any) -> Score:
    """Evaluate a model on the task; the model is what lm-eval's `HFLM` takes."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results = simple_evaluate(HFLM(device="cpu", batch_size=32, **model), tasks=[task], bootstrap_iters=0)
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    found = [response[0] for sample in samples for response in sample["filtered_resps"]]
    return Score(results["results"][TASK]["acc,none"], found)


def main() -> None:
    """Train, merge, score, print the table and append it to a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page to append to")
    arguments = parser.parse_args()

    from qlora import load_run, merge

    base = REALDATA / "models" / "stories260K-hf"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = write_rows(REALDATA / "data" / "trec" / "TREC.train.all", folder / "train.jsonl")
        task = make_task(write_rows(REALDATA / "data" / "trec" / "TREC.test.all", folder / "test.jsonl"))
        data = {"format": "completion", "eval": 0.02, "max_seq_len": 512}
        run = train_run(base, train, folder / "run", data=data, train=TRAIN)
        for onto in ("original", "dequantized"):
            merge(run, folder / onto, "float32", onto)
        model, tokenizer = load_run(run, "cpu")
        in_fp32 = {"dtype": "float32"}
        pairs = {
            "original": (
                ("PEFT's adapter on the base", score(task, pretrained=str(base), peft=str(run / "adapter"), **in_fp32)),
                ("merged", score(task, pretrained=str(folder / "original"), **in_fp32)),
            ),
            "dequantized": (
                ("the run", score(task, pretrained=model, tokenizer=tokenizer)),
                ("merged", score(task, pretrained=str(folder / "dequantized"), **in_fp32)),
            ),
        }
        before = score(task, pretrained=str(base), **in_fp32)
    lines = heading("the same scores in lm-eval", "lm_eval", "torch", "transformers", "bitsandbytes", "peft") + [
        f"{len(before.log_likelihoods) // len(KINDS)} questions; the base before training has {before.accuracy:.1%}.",
        "",
        "| base weights | model | accuracy | largest difference of log-likelihoods |",
        "|---|---|---|---|",
    ]
    for onto, ((first, adapter), (second, merged)) in pairs.items():
        difference = max(
            abs(one - other) for one, other in zip(adapter.log_likelihoods, merged.log_likelihoods, strict=True)
        )
        lines += [f"| {onto} | {first} | {adapter.accuracy:.1%} | |"]
        lines += [f"| {onto} | {second} | {merged.accuracy:.1%} | {difference:.1e} |"]
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, "# Release\n", lines)


if __name__ == "__main__":
    main()
