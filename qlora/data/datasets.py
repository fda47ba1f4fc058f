"""A training set and a held-out set from sources, with a report of what became of every row."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qlora.data.formats import FORMATS, detect_format, to_example
from qlora.data.rows import Row, read_rows
from qlora.data.template import apply_template
from qlora.data.tokens import ExampleEncoder, TokenizedExample
from qlora.errors import DataError

SHOWN_PROBLEMS = 20


@dataclass(slots=True)
class DataReport:
    """What became of the rows of one source.

    Attributes:
        per_answer: Conversations that became a document per answer, as their template rewrites earlier turns.
        overlong: What was done with examples that were too long, and how often.
        digest: Of all ids and masks: equal when the same is learnt from.
    """

    source: str
    format: str = ""
    chat_template: str = ""
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    per_answer: int = 0
    overlong: dict[str, int] = field(default_factory=dict)
    digest: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One line for people."""
        share = self.supervised_tokens / max(1, self.tokens)
        per_answer = f", {self.per_answer} conversations trained answer by answer" if self.per_answer else ""
        overlong = "".join(f", {count} overlong {fate}" for fate, count in self.overlong.items())
        return (
            f"{self.source}: {self.rows} rows as {self.format}, {self.examples} examples, {self.tokens} tokens, "
            f"{share:.0%} supervised{per_answer}{overlong}; chat template: {self.chat_template}"
        )


@dataclass(frozen=True, slots=True)
class Datasets:
    """The examples to learn from, those held out, and the reports, one per source."""

    train: list[TokenizedExample]
    eval: list[TokenizedExample]
    reports: list[DataReport]


def build_datasets(
    tokenizer: Any,
    train: str,
    eval: str | float | None = None,
    format: str = "auto",
    chat_template: str = "auto",
    loss_on: str = "assistant",
    max_seq_len: int = 2048,
    overlong: str = "drop",
    seed: int = 0,
) -> Datasets:
    """Reads, formats and tokenizes the training and held-out examples.

    Args:
        tokenizer: Of transformers; gets the chat template.
        train: See :func:`qlora.data.rows.read_rows`.
        eval: A source too, or the share of the training examples to hold out, drawn by `seed`, or None.
        format: `auto`, or one of `FORMATS`.
        chat_template: See :func:`qlora.data.template.apply_template`.
        loss_on: `assistant` or `all`.
        max_seq_len: Tokens of the longest example.
        overlong: What becomes of longer ones: `drop`, `truncate`, `split` or `error`. Always counted.
        seed: Of the choice of held-out examples.

    Raises:
        DataError: A source can't be read, or there is nothing to learn from.
    """
    template = apply_template(tokenizer, chat_template)
    encoder = ExampleEncoder(tokenizer, loss_on)

    def build(source: str) -> tuple[list[list[TokenizedExample]], DataReport]:
        report = DataReport(source, chat_template=template)
        return _build(read_rows(source), encoder, format, max_seq_len, overlong, report), report

    documents, report = build(train)
    if isinstance(eval, str):
        held_out, eval_report = build(eval)
        return Datasets(_flatten(documents), _flatten(held_out), [report, eval_report])
    return Datasets(*_hold_out(documents, eval or 0.0, seed), [report])


def _build(
    rows: list[Row], encoder: ExampleEncoder, format: str, max_seq_len: int, overlong: str, report: DataReport
) -> list[list[TokenizedExample]]:
    """The examples of each row that has any left."""
    report.rows = len(rows)
    report.format = detect_format(rows) if format == "auto" else format
    documents = [
        [part for example in examples for part in _fit(row, example, max_seq_len, overlong, report.overlong)]
        for row, examples in _encode_all(rows, encoder, report)
    ]
    documents = [examples for examples in documents if examples]
    if not documents:
        raise DataError(
            f"{report.source}: no example of {len(rows)} rows is left to learn from ({report.overlong}); "
            f"raise data.max_seq_len ({max_seq_len}) or set data.overlong to truncate or split."
        )
    examples = _flatten(documents)
    report.examples = len(examples)
    report.tokens = sum(map(len, examples))
    report.supervised_tokens = sum(example.num_supervised for example in examples)
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.input_ids.tobytes())
        digest.update(example.loss_mask.tobytes())
    report.digest = digest.hexdigest()
    return documents


def _encode_all(
    rows: list[Row], encoder: ExampleEncoder, report: DataReport
) -> list[tuple[Row, list[TokenizedExample]]]:
    """Encodes every row, and tells of all bad ones at once."""
    documents, problems = [], []
    for row in rows:
        try:
            encoded = encoder.encode(to_example(row, report.format))
        except DataError as error:
            message = str(error)
            problems.append(message if message.startswith(row.origin) else f"{row.origin}: {message}")
            continue
        report.per_answer += len(encoded) > 1
        if any(example.num_supervised for example in encoded):
            documents.append((row, encoded))
        else:
            form = FORMATS[report.format]
            problems.append(f"{row.origin}: no token of this row is supervised; {form} needs an answer.")
    if problems:
        more = f"\n… and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        shown = "\n".join(problems[:SHOWN_PROBLEMS])
        raise DataError(f"{len(problems)} of {len(rows)} rows can't be used:\n{shown}{more}")
    return documents


def _fit(
    row: Row, example: TokenizedExample, max_seq_len: int, overlong: str, counts: dict[str, int]
) -> Iterator[TokenizedExample]:
    """The parts of an example that are trained on, none longer than `max_seq_len`; counts what was done."""
    if len(example) <= max_seq_len:
        yield example
        return
    if overlong == "error":
        raise DataError(
            f"{row.origin}: {len(example)} tokens, more than data.max_seq_len ({max_seq_len}); raise it, "
            "or set data.overlong to drop, truncate or split."
        )
    starts = {"drop": [], "truncate": [0], "split": range(0, len(example), max_seq_len)}[overlong]
    parts = [example[start : start + max_seq_len] for start in starts]
    kept = [part for part in parts if part.num_supervised]
    fate = {"truncate": "truncated", "split": "split"}[overlong] if kept else "dropped"
    counts[fate] = counts.get(fate, 0) + 1
    yield from kept


def _hold_out(
    documents: list[list[TokenizedExample]], share: float, seed: int
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """Draws whole rows, so that no part of one is trained on; of a single row, a long text, its parts."""
    if not share:
        return _flatten(documents), []
    units = documents if len(documents) > 1 else [[example] for example in documents[0]]
    count = max(1, round(share * len(units)))
    if count >= len(units):
        raise DataError(f"data.eval: holding out {share} of {len(units)} examples leaves none to train on.")
    held_out = set(np.random.default_rng(seed).permutation(len(units))[:count].tolist())
    train = [unit for index, unit in enumerate(units) if index not in held_out]
    return _flatten(train), _flatten([units[index] for index in sorted(held_out)])


def _flatten(documents: list[list[TokenizedExample]]) -> list[TokenizedExample]:
    return [example for examples in documents for example in examples]
