"""Rows to examples: what the columns mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.rows import Row
from qlora.errors import DataError

FORMATS = {
    "messages": "messages: [{role, content}, …]",
    "alpaca": "instruction, [input], output or response",
    "completion": "prompt, completion",
    "text": "text",
}
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for a chat template: `{"role": …, "content": …}` each."""

    messages: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text after raw text, without a template; an empty prompt is continued pretraining."""

    prompt: str
    completion: str


Example = Conversation | Completion


def detect_format(rows: Sequence[Row]) -> str:
    """The format that the columns of the first row stand for.

    Raises:
        DataError: They stand for none; the columns and the formats are told.
    """
    columns = set(rows[0].values)
    if "messages" in columns:
        return "messages"
    if "instruction" in columns and columns & {"output", "response"}:
        return "alpaca"
    if {"prompt", "completion"} <= columns:
        return "completion"
    if "text" in columns:
        return "text"
    known = "\n".join(f"  {name}: {form}" for name, form in FORMATS.items())
    raise DataError(f"{rows[0].origin}: columns {sorted(columns)} are none of the formats known:\n{known}")


def to_example(row: Row, format: str) -> Example:
    """Reads one row.

    Raises:
        DataError: A column is absent or of the wrong type; the row is named.
    """
    values = row.values
    if format == "alpaca":
        instruction = _text(row, "instruction")
        extra = _text(row, "input") if values.get("input") else ""
        answer = _text(row, "output" if "output" in values else "response")
        turns = [("user", f"{instruction}\n\n{extra}" if extra else instruction), ("assistant", answer)]
        if values.get("system"):
            turns.insert(0, ("system", _text(row, "system")))
        return Conversation([{"role": role, "content": content} for role, content in turns])
    if format == "messages":
        return Conversation(_messages(row, values.get("messages")))
    if format == "completion":
        if isinstance(values.get("prompt"), list):
            completion = values.get("completion")
            if not isinstance(completion, list):
                raise DataError(f"{row.origin}: 'completion' should be turns, as 'prompt' is, not {completion!r:.80}.")
            return Conversation(_messages(row, [*values["prompt"], *completion]))
        return Completion(_text(row, "prompt"), _text(row, "completion"))
    return Completion("", _text(row, "text"))


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: column '{column}' should be text, not {value!r:.80}.")
    return _check_unicode(row, value)


def _check_unicode(row: Row, text: str) -> str:
    """JSON can hold halves of a surrogate pair, which are no characters and break tokenizers."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.origin}: character {error.start} of {text!r:.40} is half a surrogate pair.") from None
    return text


def _messages(row: Row, messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.origin}: 'messages' should be a list of turns, not {messages!r:.80}.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{row.origin}: a turn should have 'role' and a text 'content', not {message!r:.80}.")
        if message.get("role") not in ROLES:
            raise DataError(f"{row.origin}: role {message.get('role')!r} is none of {', '.join(ROLES)}.")
    return [{"role": message["role"], "content": _check_unicode(row, message["content"])} for message in messages]
