"""Questions: prompts of held-out rows with the answers that the rows have."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from qlora.data.datasets import Datasets
from qlora.data.examples import Completion, Conversation, Example, PartWeights
from qlora.data.formats import COLUMNS, RowReader
from qlora.data.rows import Row, read_rows
from qlora.data.store import ExampleSet
from qlora.data.tables import HeaderRule
from qlora.data.template import adds_bos, encode_prompt
from qlora.errors import DataError

# Formats whose rows have one answer to each prompt.
ANSWERED_FORMATS = ("alpaca", "sharegpt", "messages", "completion", "chosen", "oasst")
# Ends the reasoning that a model may write before its answer.
END_OF_REASONING = "</think>"
# Why a row is not asked.
NO_ANSWER = "no answer in text"
NO_PROMPT = "a chat template that does not render the prompt alone"
TOO_LONG = "a prompt longer than data.max_seq_len"


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its answer.

    Attributes:
        prompt: Ids of everything before the answer, as a server feeds it.
        reference: The answer in the data.
        text: The prompt, for people.
    """

    prompt: list[int]
    reference: str
    text: str


def after_reasoning(text: str) -> str:
    """Return what follows a model's reasoning in an answer; the whole answer if it has none."""
    return text.rpartition(END_OF_REASONING)[2]


def prompt_text(messages: Sequence[dict[str, Any]]) -> str:
    """Return the turns before an answer for people: a single one as it is, others with their roles."""
    texts = [str(message.get("content") or "") for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts, strict=True))


def read_questions(
    tokenizer: Any, datasets: Datasets, examples: ExampleSet, count: int, max_length: int
) -> tuple[list[Question], dict[str, int]]:
    """Read the last answer of rows with its prompt again from their sources.

    Rows without an answer in text, such as a call, and those with a longer prompt than `max_length` are left out.
    Reasoning is no part of an answer, as in what a model answers.

    Args:
        tokenizer: Tokenizer with the chat template set.
        datasets: The data that the examples are from.
        examples: Examples whose rows are read: at most `count` of them, evenly spread.
        count: Largest number of rows.
        max_length: Largest number of tokens of a prompt.

    Returns:
        The questions, in the order of the rows, and the number of rows that are left out, by what they have. Both are
        empty if no source has a format in `ANSWERED_FORMATS`.
    """
    reports = datasets.all_reports
    places = [
        (store, row)
        for store, rows in examples.rows_of(range(len(examples))).items()
        if reports[store].format in ANSWERED_FORMATS
        for row in rows
    ]
    chosen = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)).tolist()
    rows_of: dict[int, set[int]] = {}
    for store, row in map(places.__getitem__, chosen):
        rows_of.setdefault(store, set()).add(row)
    questions: list[Question] = []
    left_out: Counter[str] = Counter()
    for store, wanted in rows_of.items():
        source = datasets.sources[store]
        reader = RowReader(reports[store].format, source.columns, source.roles)
        rows_read = islice(read_rows(source, HeaderRule(source.header, source.columns.values(), COLUMNS)), max(wanted))
        for number, each in enumerate(rows_read, 1):
            if number in wanted and isinstance(each, Row):
                found: Question | str = _question(tokenizer, reader.read(each))
                if isinstance(found, Question) and len(found.prompt) > max_length:
                    found = TOO_LONG
                if isinstance(found, Question):
                    questions.append(found)
                else:
                    left_out[found] += 1
    return questions, dict(left_out)


def _question(tokenizer: Any, example: Example) -> Question | str:
    """Return the question of an example, or why it is not asked."""
    if isinstance(example, Completion):
        ids = tokenizer(example.prompt, add_special_tokens=False).input_ids
        starts = [tokenizer.bos_token_id] if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id] else []
        return _with_answer([*starts, *ids], example.completion, example.prompt)
    if not isinstance(example, Conversation):
        return NO_ANSWER
    messages = example.messages
    turn = _last_answer(messages, example.weights or [1.0] * len(messages))
    if not turn or "tool_calls" in messages[turn]:
        return NO_ANSWER
    try:
        prompt = encode_prompt(tokenizer, messages[:turn], example.tools)
    except DataError:  # a template may take the whole conversation only
        return NO_PROMPT
    return _with_answer(prompt, messages[turn]["content"], prompt_text(messages[:turn]))


def _with_answer(prompt: list[int], answer: str, text: str) -> Question | str:
    reference = after_reasoning(answer)
    if not prompt:
        return NO_PROMPT
    return Question(prompt, reference, text) if reference.strip() else NO_ANSWER


def _last_answer(messages: Sequence[dict[str, Any]], weights: Sequence[float | PartWeights]) -> int | None:
    """Return the last turn of the assistant that is supervised; None if there is none."""
    for turn in reversed(range(len(messages))):
        weight = weights[turn]
        if messages[turn]["role"] == "assistant" and (weight.max_weight if isinstance(weight, PartWeights) else weight):
            return turn
    return None
