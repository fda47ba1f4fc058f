"""Test every chat template of the real data with every tokenizer and some forty conversations.

Each case is right if nothing of the conversation is lost, only answers with their end tokens are supervised, and each
answer follows the ids that a server feeds, by a slow reference that shares no code with qlora. Otherwise it is refused
or wrong. Nothing is downloaded. A table is appended to docs/benchmarks/templates.md.

    QLORA_REALDATA=FOLDER python -m scripts.dev.bench.templates [--template NAME …] [--tokenizer NAME …] [--out FILE]
"""

import argparse
import logging
import os
import re
import sys
import time
from collections import Counter
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora.data.encode import ExampleEncoder
from qlora.data.formats import RowReader
from qlora.data.rows import Row
from qlora.errors import QLoRAError
from scripts.dev.bench.template_conversations import conversations
from scripts.dev.bench.template_reference import WrongError, check, refusal_is_right

REALDATA = Path(os.environ.get("QLORA_REALDATA", Path(__file__).parents[3] / "shared" / "realdata"))
TOKENIZERS = ("minimind", "qwen3", "tinyllama_chat_hf", "mistral7b_v01_hf")
# A tokenizer that has the control tokens of the template at hand, as the model's own does.
FAMILY = "with the template's control tokens"
CONTROL = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|</?s>|\[/?[A-Z_]+\]|<(?:start|end)_of_turn>|<\|[a-z_]+>|<[a-z_]+\|>")
# Tokenizers whose ids decode to the text that they were made of.
EXACT = (FAMILY, "minimind", "qwen3")
# Reasons for refusing a case, by words of the error.
REASONS = {
    "the template's own refusal": "refuses this conversation",
    "it leaves out tools, calls, results, reasoning or the system turn": "leaves out this conversation's",
    "it leaves out or changes what a turn says": "leaves out or changes what",
    "its prompt is not how its answers begin": "is not how its rendering",
    "it begins another turn behind an answer that it has not ended": "that it has not ended",
    "it writes no plain text": "writes no plain text",
    "it begins with BOS twice": "with BOS twice",
}


@cache
def load_tokenizer(name: str) -> tuple[Any, Any]:
    """Return a tokenizer of the real data, and its own template."""
    tokenizer = AutoTokenizer.from_pretrained(REALDATA / "tokenizers" / name)
    return tokenizer, tokenizer.chat_template


def make_tokenizer(name: str, template: str | None) -> Any:
    """Return a tokenizer of the real data with a template set; None keeps its own."""
    tokenizer, own = load_tokenizer("minimind" if name == FAMILY else name)
    if name == FAMILY:
        inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|endoftext|>")
        controls = sorted(set(CONTROL.findall(template or "")))
        tokenizer.add_tokens([AddedToken(one, special=True, normalized=False) for one in controls], special_tokens=True)
    tokenizer.chat_template = own if template is None else template
    return tokenizer


def try_case(encoder: ExampleEncoder, row: dict[str, Any], exact: bool) -> tuple[str, str]:
    """Encode a conversation; return the outcome, `right`, `refused`, `needless` or `wrong`, and why."""
    try:
        (encoded,) = encoder.encode([RowReader().read(Row(row, "row"))])
    except QLoRAError as error:
        encoded = error
    if isinstance(encoded, QLoRAError):
        reason = next((name for name, words in REASONS.items() if words in str(encoded)), f"another: {encoded}")
        return ("refused" if refusal_is_right(encoder.tokenizer, row) else "needless"), reason
    documents = [(each.input_ids.tolist(), each.loss_mask.tolist()) for each in encoded.documents]
    try:
        check(encoder.tokenizer, row, documents, exact)
    except WrongError as error:
        return "wrong", str(error)
    return "right", "answer by answer" if encoded.per_answer else "whole"


def templates() -> dict[str, str | None]:
    """Return every template of the real data by name; None is a tokenizer's own."""
    paths = sorted((REALDATA / "chat_templates").glob("*/*.jinja"))
    return {"its own": None} | {f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8") for path in paths}


def main() -> None:
    """Print every wrong case, and a table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--template", nargs="*", help="only templates whose name contains one of these")
    parser.add_argument("--tokenizer", nargs="*", default=[*TOKENIZERS, FAMILY])
    parser.add_argument("--conversation", nargs="*", help="only these conversations")
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    parser.add_argument("--needless", action="store_true", help="print the cases that were refused needlessly")
    arguments = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.disable(logging.ERROR)
    chosen = {
        name: text for name, text in templates().items() if any(one in name for one in arguments.template or [""])
    }
    counts: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in arguments.tokenizer}
    started, num_conversations = time.monotonic(), 0
    for name, text in chosen.items():
        print(f"… {name}", file=sys.stderr, flush=True)
        for tokenizer_name in arguments.tokenizer:
            tokenizer = make_tokenizer(tokenizer_name, text)
            if not tokenizer.chat_template:
                continue
            rows = conversations(tokenizer.eos_token)
            num_conversations = len(rows)
            encoder = ExampleEncoder(tokenizer)
            for case, row in rows.items():
                if arguments.conversation and case not in arguments.conversation:
                    continue
                result, why = try_case(encoder, row, tokenizer_name in EXACT)
                counts[tokenizer_name][result, why if result != "wrong" else ""] += 1
                if result == "wrong" or (result == "needless" and arguments.needless):
                    print(f"{result}: {name}, {tokenizer_name}, {case}: {why}", flush=True)
    table = _table(counts, len(chosen), num_conversations, time.monotonic() - started)
    print(table)
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write("\n" + table)
    sys.exit(any(result == "wrong" for each in counts.values() for result, _ in each))


def _table(counts: dict[str, Counter[tuple[str, str]]], templates: int, conversations: int, seconds: float) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "tokenizers"))
    lines = [
        f"## {date.today()}: {templates} templates, {conversations} conversations, {versions}, {seconds:.0f} s", "",
        "| " + " | ".join(["outcome", *counts, "all"]) + " |", "|---" * (len(counts) + 2) + "|",
    ]  # fmt: skip
    outcomes = {
        "right, as one document": [("right", "whole")],
        "right, answer by answer": [("right", "answer by answer")],
        **{f"refused: {why}": [("refused", why)] for why in REASONS},
        "refused, though another rendering would serve": None,
        "refused for another reason": None,
        "wrong": [("wrong", "")],
    }
    for label, keys in outcomes.items():
        numbers = []
        for each in counts.values():
            if label.startswith("refused, though"):
                numbers.append(sum(count for (result, _), count in each.items() if result == "needless"))
            elif keys is None:
                numbers.append(
                    sum(count for (result, why), count in each.items() if result == "refused" and why not in REASONS)
                )
            else:
                numbers.append(sum(each[key] for key in keys))
        lines.append(f"| {label} | " + " | ".join(f"{number:,}" for number in [*numbers, sum(numbers)]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
