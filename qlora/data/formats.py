"""Formats of rows: which one a source has, and reading its rows to examples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora.data.conversations import (
    TURN_COLUMNS,
    read_alpaca,
    read_completion,
    read_oasst,
    read_prompt,
    read_tool_column,
    read_turns,
)
from qlora.data.documents import read_classification, read_image, read_text, read_tokenized
from qlora.data.examples import Conversation, Example, LabelledImage
from qlora.data.mismatched import RATING
from qlora.data.ratings import MARGIN, read_chosen, read_kto, read_preference, verdict_of
from qlora.data.rows import Row
from qlora.data.store import Column
from qlora.data.turns import MEDIA_KEYS, TRANSCRIPT_START, TurnReader
from qlora.errors import ConfigError, DataError

FORMATS = {
    "alpaca": "instruction, [input], output or response, [system], [history]",
    "sharegpt": "conversations: [{from, value}, …], [system], [tools]",
    "messages": "messages: [{role, content, [tool_calls], [weight]}, …], [tools]",
    "completion": "prompt, completion",
    "text": "text",
    "tokenized": "input_ids, [labels or loss_mask]",
    "preference": "chosen, rejected, [margin], and prompt, instruction, conversations or messages unless they have it",
    "chosen": "as preference, but only the chosen answer is trained on",
    "kto": "label (true or false), and a conversation in any of the forms above",
    "classification": "text, label",
    "images": "image, label; or a folder with a folder of images for each label",
    "oasst": "message_tree_id, prompt: {text, role, replies}, or one such message",
}
# Formats whose rows are rendered by a chat template.
CONVERSATIONS = ("alpaca", "sharegpt", "messages", "oasst", "preference", "chosen", "kto")
# Columns of the stores of a format, in addition to those of every store.
STORED_COLUMNS: Mapping[str, Sequence[Column]] = {
    "kto": (Column(RATING, "int8", "document"),),
    "preference": (Column(MARGIN, "float32", "document"),),
}
# Names that a mapping may have: all columns of all formats, and the keys of a turn.
COLUMNS = {
    "instruction", "input", "output", "response", "system", "history", "tools", *TURN_COLUMNS, "prompt", "completion",
    "text", "input_ids", "labels", "loss_mask", "attention_mask", "chosen", "rejected", "chosen_messages",
    "rejected_messages", "margin", "label", "image", "message_tree_id", "message_id", "replies", "role", "content",
}  # fmt: skip
_READERS: dict[str, Callable[[TurnReader, Row], Example]] = {
    "alpaca": read_alpaca,
    "sharegpt": read_turns,
    "messages": read_turns,
    "completion": read_completion,
    "text": read_text,
    "tokenized": read_tokenized,
    "preference": read_preference,
    "chosen": read_chosen,
    "kto": read_kto,
    "classification": read_classification,
    "images": read_image,
    "oasst": read_oasst,
}


def detect_format(columns: Mapping[str, Any], origin: str) -> str:
    """Detect the format of a row from the names of its columns.

    Args:
        columns: Values of the row by our names of the columns.
        origin: Origin of the row, for messages.

    Raises:
        DataError: No format has these columns; the message lists them and the formats.
    """
    names = columns.keys()
    if "input_ids" in names:
        return "tokenized"
    if names >= {"chosen", "rejected"} or names >= {"chosen_messages", "rejected_messages"}:
        return "preference"
    if names >= {"message_tree_id", "prompt"} or names >= {"message_id", "replies"}:
        return "oasst"
    turns = next((columns[name] for name in TURN_COLUMNS if name in names), None)
    is_alpaca = "instruction" in names and not names.isdisjoint({"output", "response"})
    is_completion = names >= {"prompt", "completion"}
    if (turns is not None or is_alpaca or is_completion) and verdict_of(columns.get("label")) is not None:
        return "kto"
    if turns is not None:
        first = turns[0] if isinstance(turns, list) and turns else {}
        return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"
    if is_alpaca:
        return "alpaca"
    if is_completion:
        return "completion"
    if "text" in names:
        return "classification" if "label" in names else "text"
    if names >= {"image", "label"}:
        return "images"
    known = "\n".join(f"  {name}: {form}" for name, form in FORMATS.items())
    raise DataError(
        f"{origin}: no format has the columns {sorted(names)}; map them with data.columns, as {{instruction: question, "
        f"output: answer}}, to those of a format:\n{known}"
    )


class RowReader:
    """Reads the rows of one source.

    Args:
        format: One of `FORMATS`, or `auto`, which detects it from the first row.
        columns: Names of columns or of a turn's keys in the data, by our names.
        roles: Our names of roles, by the names in the data.

    Attributes:
        format: Format of the rows; `auto` until it is detected.
        unread: Columns that are not read, over all rows.
        notes: Lines that a user should know about the rows.

    Raises:
        ConfigError: The format is unknown, or a mapping has a column or role that no format has.
    """

    def __init__(
        self,
        format: str = "auto",
        columns: Mapping[str, str] = {},  # noqa: B006 (never changed)
        roles: Mapping[str, str] = {},  # noqa: B006 (never changed)
    ) -> None:
        if format not in ("auto", *FORMATS):
            raise ConfigError(f"data.format: '{format}' is unknown; use one of auto, {', '.join(FORMATS)}.")
        for name in columns.keys() - COLUMNS:
            known = ", ".join(sorted(COLUMNS))
            raise ConfigError(f"data.columns: no format has a column '{name}'; use one of {known}.")
        for name, role in roles.items():
            if role not in ("system", "user", "assistant", "tool"):
                raise ConfigError(f"data.roles: {name}: '{role}' should be system, user, assistant or tool.")
        self.format = format
        self.unread: set[str] = set()
        self.notes: set[str] = set()
        self._columns = {ours: theirs for ours, theirs in columns.items() if ours not in ("role", "content")}
        self._turns = TurnReader(columns, roles)

    @property
    def unread_keys(self) -> set[str]:
        """Keys of turns and of their parts that are not read."""
        return self._turns.unread

    def detect(self, rows: Iterable[Row]) -> None:
        """Detect the format from the first row whose columns belong to one.

        Raises:
            DataError: No row's columns do; the message is that of the first row.
        """
        first_error: DataError | None = None
        for row in rows:
            try:
                self.format = detect_format(self._mapped(row).values, row.origin)
                return
            except DataError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error

    def read(self, row: Row) -> Example:
        """Read one row.

        Raises:
            DataError: A column is absent or of the wrong type; the message names the row.
        """
        if self.format == "auto":
            self.detect([row])
        row = self._mapped(row)
        if self.format != "images":
            _check_media(row)
        values = _Watched(row.values)
        example = _READERS[self.format](self._turns, Row(values, row.origin))
        if isinstance(example, LabelledImage) and isinstance(example.image, Path):
            example = replace(example, image=(row.folder or Path()) / example.image)
        self.unread |= values.keys() - values.read
        if self.format == "text" and row.values["text"].startswith(TRANSCRIPT_START):
            self.notes.add(
                "some texts are conversations in HH-RLHF's form and are trained on as plain text; to train on their "
                "answers only, set format: chosen and columns: {chosen: text}"
            )
        return example

    def read_prompt(self, row: Row) -> Conversation:
        """Read a row without an answer.

        Raises:
            DataError: A column is absent or of the wrong type, or the last turn is an answer; the message names the
                row.
        """
        row = self._mapped(row)
        _check_media(row)
        conversation = read_prompt(self._turns, row)
        if conversation.messages[-1]["role"] == "assistant":
            raise DataError(f"{row.origin}: the last turn is already an answer; end with a user turn.")
        return replace(conversation, tools=read_tool_column(row))

    def _mapped(self, row: Row) -> Row:
        """Rename the columns of a row to our names."""
        if not self._columns:
            return row
        others = {name: value for name, value in row.values.items() if name not in self._columns.values()}
        mapped = {ours: row.values[theirs] for ours, theirs in self._columns.items() if theirs in row.values}
        self.unread |= others.keys() & mapped.keys()
        return replace(row, values=others | mapped)


class _Watched(dict[str, Any]):
    """A row's values that record which of them are read."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or the default."""
        self.read.add(name)
        return super().get(name, default)


def _check_media(row: Row) -> None:
    media = [name for name in MEDIA_KEYS if row.values.get(name)]
    if media:
        raise DataError(f"{row.origin}: it has {', '.join(media)}; only text is supported.")
