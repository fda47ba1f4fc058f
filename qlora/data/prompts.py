"""Prompts from a file: rows as training reads them, but without the answer."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.data.examples import Conversation
from qlora.data.formats import COLUMNS, RowReader
from qlora.data.problems import counted
from qlora.data.rows import BadRow, Row, read_rows
from qlora.data.serving import TemplateFacts
from qlora.data.sources import Source
from qlora.data.tables import HeaderRule
from qlora.data.template import render
from qlora.errors import DataError

# Column for the answer.
ANSWER = "answer"
MAX_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row with its conversation, which ends before the answer.

    Attributes:
        origin: File and line or row number, for messages.
        columns: The row's columns as a JSON object.
        conversation: The conversation in the columns.
    """

    origin: str
    columns: str
    conversation: Conversation

    def answered(self, answer: str) -> str:
        """Return the row's columns with the answer added, as a line of JSON."""
        return f"{self.columns[:-1]}, {_as_json(ANSWER)}: {_as_json(answer)}}}\n"


def read_prompts(path: str, system: str | None = None) -> list[Prompt]:
    """Read every prompt of a file.

    Args:
        path: A file of any type that training reads. Each row has a `prompt` (text or turns), `messages`, or alpaca's
            `instruction` and `input`.
        system: System message for rows without one.

    Raises:
        DataError: There is no such file, or rows can't be answered; the message names these rows.
    """
    if not Path(path).is_file():
        raise DataError(f"--prompts: there is no file {path}.")
    source = Source(path)
    reader, prompts, problems = RowReader(), [], []
    for row in read_rows(source, HeaderRule(source.header, (), COLUMNS)):
        try:
            prompts.append(_read_prompt(reader, row, system))
        except DataError as error:
            problems.append(str(error))
    _raise_problems(problems)
    return prompts


def check_prompts(tokenizer: Any, prompts: Iterable[Prompt]) -> None:
    """Check that the chat template accepts every prompt and leaves nothing of it out.

    Raises:
        ConfigError: The template begins with BOS twice.
        DataError: It refuses prompts or leaves out part of them; the message names these prompts.
    """
    facts, problems = TemplateFacts(tokenizer), []
    for prompt in prompts:
        try:
            check_prompt(tokenizer, facts, prompt.conversation)
        except DataError as error:
            problems.append(f"{prompt.origin}: {error}")
    _raise_problems(problems)


def check_prompt(tokenizer: Any, facts: TemplateFacts, conversation: Conversation) -> None:
    """Check that the chat template accepts a prompt and writes everything that it has.

    Raises:
        ConfigError: The template begins with BOS twice.
        DataError: It refuses the prompt, or leaves something out.
    """
    messages, tools = conversation.messages, conversation.tools
    facts.check(messages, tools)
    text = render(tokenizer, messages, tools, add_generation_prompt=True)
    facts.check_written([message for message in messages if message["role"] != "assistant"], text)


def _read_prompt(reader: RowReader, row: Row | BadRow, system: str | None) -> Prompt:
    if isinstance(row, BadRow):
        raise DataError(f"{row.origin}: {row.problem}")
    if ANSWER in row.values:
        raise DataError(
            f"{row.origin}: it already has a column '{ANSWER}', which is the name of the answer's column; rename it."
        )
    conversation = reader.read_prompt(row)
    if system and conversation.messages[0]["role"] != "system":
        conversation.messages.insert(0, {"role": "system", "content": system})
    try:
        columns = _as_json(row.values)
        columns.encode()
    except UnicodeEncodeError:
        raise DataError(f"{row.origin}: a column has half a surrogate pair, which can't be written.") from None
    except TypeError as error:
        raise DataError(f"{row.origin}: its columns can't be written as JSON: {error}; convert or drop them.") from None
    return Prompt(row.origin, columns, conversation)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _raise_problems(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise DataError(
            "\n  ".join([f"{counted(len(problems), 'row')} can't be answered:", *problems[:MAX_SHOWN], *more])
        )
