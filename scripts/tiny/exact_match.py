"""Ask a model every held-out question and count the answers that match exactly.

python scripts/tiny/exact_match.py RUN|MODEL heldout.jsonl [--show 3]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from qlora.cli.main import quiet_libraries


def main() -> None:
    """Print some answers and the share of exact matches; exit with 1 if it is outside of --at-least and --at-most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run directory or model folder")
    parser.add_argument("questions", type=Path, help="alpaca rows, one JSON object per line")
    parser.add_argument("--show", type=int, default=3, help="number of answers to print")
    parser.add_argument("--at-least", type=float, default=0.0, help="smallest share that must match")
    parser.add_argument("--at-most", type=float, default=1.0, help="largest share that may match")
    arguments = parser.parse_args()
    quiet_libraries()

    from qlora.model import load_model

    model, tokenizer = load_model(arguments.model)
    rows = [json.loads(line) for line in arguments.questions.read_text(encoding="utf-8").splitlines()]
    answers = [ask(model, tokenizer, row) for row in rows]
    for row, answer in list(zip(rows, answers, strict=True))[: arguments.show]:
        print(f"  {row['instruction']}\n    → {answer!r}   (expected: {row['output']!r})")
    share = sum(answer == row["output"] for row, answer in zip(rows, answers, strict=True)) / len(rows)
    print(f"  exact match on {len(rows)} held-out questions: {share:.0%}")
    if not arguments.at_least <= share <= arguments.at_most:
        raise SystemExit(f"expected between {arguments.at_least:.0%} and {arguments.at_most:.0%}")


def ask(model: Any, tokenizer: Any, row: dict[str, str]) -> str:
    """Return the model's greedy answer to a row's instruction."""
    from qlora.model import answer

    prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return answer(model, tokenizer, [{"role": "user", "content": prompt}], max_new_tokens=32)


if __name__ == "__main__":
    main()
