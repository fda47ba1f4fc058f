"""Prompts to answer, read from a file: rows as training reads them, but without the answer."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.data.examples import Conversation
from qlora.data.formats import RowReader
from qlora.data.rows import BadRow, Row, read_rows
from qlora.data.sources import Source
from qlora.data.template import encode_prompt
from qlora.errors import DataError

# The column that an answer is written to.
ANSWER = "answer"
MAX_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row with its conversation, which ends before the answer."""

    row: Row
    conversation: Conversation

    def answered(self, answer: str) -> dict[str, Any]:
        """Return the row's columns with the answer added."""
        return self.row.values | {ANSWER: answer}


def read_prompts(path: str, system: str | None = None) -> list[Prompt]:
    """Read every prompt of a file.

    Args:
        path: A file of any type that training reads. Each row has a `prompt` (text or turns), `messages`, or alpaca's
            `instruction` and `input`.
        system: System message for rows without one.

    Raises:
        DataError: There is no such file, or rows can't be answered; names all of them.
    """
    if not Path(path).is_file():
        raise DataError(f"--prompts: there is no file {path}.")
    reader, prompts, problems = RowReader(), [], []
    for row in read_rows(Source(path)):
        try:
            prompts.append(_read_prompt(reader, row, system))
        except DataError as error:
            problems.append(str(error))
    _raise_problems(problems)
    return prompts


def check_prompts(tokenizer: Any, prompts: Iterable[Prompt]) -> None:
    """Check that the chat template accepts every prompt.

    Raises:
        DataError: It refuses some; names all of them.
    """
    problems = []
    for prompt in prompts:
        try:
            encode_prompt(tokenizer, prompt.conversation.messages, prompt.conversation.tools)
        except DataError as error:
            problems.append(f"{prompt.row.origin}: {error}")
    _raise_problems(problems)


def _read_prompt(reader: RowReader, row: Row | BadRow, system: str | None) -> Prompt:
    if isinstance(row, BadRow):
        raise DataError(f"{row.origin}: {row.problem}")
    if ANSWER in row.values:
        raise DataError(f"{row.origin}: it already has a column '{ANSWER}', where its answer would go; rename it.")
    conversation = reader.read_prompt(row)
    if system and conversation.messages[0]["role"] != "system":
        conversation.messages.insert(0, {"role": "system", "content": system})
    return Prompt(row, conversation)


def _raise_problems(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise DataError("\n  ".join([f"{len(problems)} rows can't be answered:", *problems[:MAX_SHOWN], *more]))
