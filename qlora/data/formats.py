"""Rows to examples: what the columns mean."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from qlora.data.examples import Completion, Conversation, Example, Labelled, PartWeights, Preference, Rated, Tokens
from qlora.data.masks import check_weight
from qlora.data.rows import Row
from qlora.data.turns import (
    MEDIA_KEYS,
    TRANSCRIPT_FORM,
    TRANSCRIPT_START,
    TurnReader,
    check_unicode,
    parse_json,
    read_spoken,
    read_tools,
    read_transcript,
)
from qlora.errors import ConfigError, DataError

FORMATS = {
    "alpaca": "instruction, [input], output or response, [system], [history]",
    "sharegpt": "conversations: [{from, value}, …], [system], [tools]",
    "messages": "messages: [{role, content, [tool_calls], [weight]}, …], [tools]",
    "completion": "prompt, completion",
    "text": "text",
    "tokenized": "input_ids, [labels or loss_mask]",
    "preference": "chosen, rejected, and prompt, instruction, conversations or messages unless they hold it",
    "chosen": "as preference, of which the chosen answer alone is learned",
    "kto": "label (true or false), and a conversation in any of the forms above",
    "classification": "text, label",
    "oasst": "message_tree_id, prompt: {text, role, replies}, or one such message",
}
TURN_COLUMNS = ("messages", "conversations", "conversation")
# What a mapping may give: every column that some format reads, and the keys of a turn.
COLUMNS = {
    "instruction", "input", "output", "response", "system", "history", "tools", *TURN_COLUMNS, "prompt", "completion",
    "text", "input_ids", "labels", "loss_mask", "attention_mask", "chosen", "rejected", "chosen_messages",
    "rejected_messages", "label", "message_tree_id", "message_id", "replies", "role", "content",
}  # fmt: skip
# What says where a message of a tree is, and whether it counts.
TREE_KEYS = ("message_tree_id", "message_id", "replies", "rank", "deleted", "review_result")
IGNORED_LABEL = -100


def detect_format(columns: Mapping[str, Any], origin: str) -> str:
    """The format that the columns of a row stand for.

    Args:
        columns: Of the row, with their values, under our names.
        origin: Of the row.

    Raises:
        DataError: They stand for none; the columns and the formats are told.
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
    if (turns is not None or is_alpaca or is_completion) and _verdict(columns.get("label")) is not None:
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
    known = "\n".join(f"  {name}: {form}" for name, form in FORMATS.items())
    raise DataError(
        f"{origin}: columns {sorted(names)} are none of the formats known; map them with data.columns, "
        f"as {{instruction: question, output: answer}}:\n{known}"
    )


class RowReader:
    """Reads the rows of one source.

    Args:
        format: One of `FORMATS`, or `auto`, which the first row decides.
        columns: Our name of a column, or of a turn's key, to theirs.
        roles: Their name of a speaker to ours.

    Attributes:
        format: Which of `FORMATS` the rows are read as, once a row has decided.
        unread: Columns that nothing read, over all rows.
        notes: What a user should know of the rows.

    Raises:
        ConfigError: There is no such format, or a mapping gives a column or a role that no format has.
    """

    def __init__(self, format: str = "auto", columns: Mapping[str, str] = {}, roles: Mapping[str, str] = {}) -> None:  # noqa: B006 (never changed)
        if format not in ("auto", *FORMATS):
            raise ConfigError(f"data.format: '{format}' is unknown; there are auto, {', '.join(FORMATS)}.")
        for name in columns.keys() - COLUMNS:
            raise ConfigError(f"data.columns: no format has a column '{name}'; there are {', '.join(sorted(COLUMNS))}.")
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
        """Keys of turns and of their parts that nothing read."""
        return self._turns.unread

    def detect(self, rows: Iterable[Row]) -> None:
        """Takes the format of the first row whose columns stand for one.

        Raises:
            DataError: No row's do; those of the first are told.
        """
        refusal: DataError | None = None
        for row in rows:
            try:
                self.format = detect_format(self._mapped(row).values, row.origin)
                return
            except DataError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal

    def read(self, row: Row) -> Example:
        """Reads one row.

        Raises:
            DataError: A column is absent or of the wrong type; the row is named.
        """
        if self.format == "auto":
            self.detect([row])
        row = self._mapped(row)
        _check_media(row)
        values = _Watched(row.values)
        example = _READERS[self.format](self, Row(values, row.origin))
        self.unread |= values.keys() - values.read
        return example

    def read_prompt(self, row: Row) -> Conversation:
        """Read a row that is to be answered, so the conversation ends before an answer.

        Raises:
            DataError: A column is absent or of the wrong type, or an answer comes last; names the row.
        """
        row = self._mapped(row)
        _check_media(row)
        conversation = self._prompt(row)
        if conversation.messages[-1]["role"] == "assistant":
            raise DataError(f"{row.origin}: the last turn is an answer already; end with the user's turn.")
        return replace(conversation, tools=self._tools(row))

    def _mapped(self, row: Row) -> Row:
        """The row under our names of its columns."""
        if not self._columns:
            return row
        others = {name: value for name, value in row.values.items() if name not in self._columns.values()}
        mapped = {ours: row.values[theirs] for ours, theirs in self._columns.items() if theirs in row.values}
        self.unread |= others.keys() & mapped.keys()
        return Row(others | mapped, row.origin)

    def _read_alpaca(self, row: Row) -> Conversation:
        if row.values.keys().isdisjoint({"output", "response"}):
            raise DataError(f"{row.origin}: there is neither 'output' nor 'response'.")
        answer = _text(row, "output" if "output" in row.values else "response")
        return Conversation([*self._alpaca_prompt(row), _turn("assistant", answer)], self._tools(row))

    def _alpaca_prompt(self, row: Row) -> list[dict[str, Any]]:
        values = row.values
        messages = self._system(row)
        history = values.get("history") or []
        if isinstance(history, str):  # a table holds lists as JSON
            history = parse_json(row, "history", history)
        for pair in history if isinstance(history, list) else [history]:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise DataError(f"{row.origin}: 'history' should hold pairs of question and answer, not {pair!r:.80}.")
            question, answer = (check_unicode(row, text) for text in pair)
            messages += [_turn("user", question), _turn("assistant", answer)]
        instruction = _text(row, "instruction")
        extra = _text(row, "input") if values.get("input") else ""
        return [*messages, _turn("user", f"{instruction}\n\n{extra}" if extra else instruction)]

    def _read_turns(self, row: Row) -> Conversation:
        column = next((name for name in TURN_COLUMNS if name in row.values), "messages")
        turns, weights = self._turns.read_all(row, column, row.values.get(column))
        return self._follow(Conversation(self._system(row)), turns, weights, row)

    def _read_completion(self, row: Row) -> Conversation | Completion:
        prompt, completion = row.values.get("prompt"), row.values.get("completion")
        if not isinstance(prompt, list):
            return Completion(_text(row, "prompt"), _text(row, "completion"))
        if not isinstance(completion, list):
            raise DataError(f"{row.origin}: 'completion' should be turns, as 'prompt' is, not {completion!r:.80}.")
        messages, weights = self._turns.read_all(row, "prompt", [*prompt, *completion])
        return Conversation(messages, self._tools(row), weights)

    def _read_text(self, row: Row) -> Completion:
        text = _text(row, "text")
        if text.startswith(TRANSCRIPT_START):
            self.notes.add(
                "some texts are conversations in HH-RLHF's form and are learned whole, as text; to learn their answers "
                "alone, set format: chosen and columns: {chosen: text}"
            )
        return Completion("", text)

    def _read_tokenized(self, row: Row) -> Tokens:
        ids = _numbers(row, "input_ids")
        if not ids:
            raise DataError(f"{row.origin}: 'input_ids' is empty.")
        weights = [1.0] * len(ids)
        if row.values.get("loss_mask") is not None:
            weights = [check_weight(row, weight) for weight in _numbers(row, "loss_mask", len(ids))]
        elif row.values.get("labels") is not None:
            labels = _numbers(row, "labels", len(ids))
            for place, (label, token) in enumerate(zip(labels, ids, strict=True)):
                if label not in (IGNORED_LABEL, token):
                    raise DataError(
                        f"{row.origin}: label {place} is {label}, neither input id {token} nor {IGNORED_LABEL}; labels "
                        "should be the ids themselves, not shifted."
                    )
            weights = [float(label != IGNORED_LABEL) for label in labels]
        is_padding = [False] * len(ids)
        if row.values.get("attention_mask") is not None:
            is_padding = [not attended for attended in _numbers(row, "attention_mask", len(ids))]
        kept = [place for place in range(len(ids)) if not is_padding[place]]
        return Tokens([ids[place] for place in kept], [weights[place] for place in kept])

    def _read_preference(self, row: Row) -> Preference:
        return Preference(self._answered(row, "chosen"), self._answered(row, "rejected"))

    def _read_chosen(self, row: Row) -> Conversation:
        return self._answered(row, "chosen")

    def _answered(self, row: Row, name: str) -> Conversation:
        values = row.values
        answer = values.get(f"{name}_messages", values.get(name))
        turns: list[dict[str, Any]] | None
        weights: list[float | PartWeights] | None = None
        if isinstance(answer, str):
            turns = read_transcript(check_unicode(row, answer))
            if not turns or not answer.startswith(TRANSCRIPT_START) and self._has_prompt(row):
                turns = [self._spoken(row, answer)]
        else:
            turns, weights = self._turns.read_all(row, name, answer)
        if turns[0]["role"] == "assistant":
            return self._follow(self._prompt(row), turns, weights, row)
        # It holds the whole conversation; the other columns then give its prompt once more.
        system = [] if turns[0]["role"] == "system" else self._system(row)
        return self._follow(Conversation(system), turns, weights, row)

    def _follow(
        self, prompt: Conversation, turns: list[dict[str, Any]], weights: list[float | PartWeights] | None, row: Row
    ) -> Conversation:
        """Turns behind those of a prompt."""
        joined = None
        if prompt.weights or weights:
            joined = [*(prompt.weights or [1.0] * len(prompt.messages)), *(weights or [1.0] * len(turns))]
        return Conversation([*prompt.messages, *turns], self._tools(row), joined)

    def _has_prompt(self, row: Row) -> bool:
        return not row.values.keys().isdisjoint({*TURN_COLUMNS, "prompt", "instruction"})

    def _prompt(self, row: Row) -> Conversation:
        """The turns before an answer."""
        values = row.values
        column = next((name for name in TURN_COLUMNS if values.get(name)), "prompt")
        if column != "prompt" or isinstance(values.get("prompt"), list):
            turns, weights = self._turns.read_all(row, column, values[column])
            return self._follow(Conversation(self._system(row)), turns, weights, row)
        if "prompt" in values:
            turns = self._transcript(row) or [_turn("user", _text(row, "prompt"))]
            return Conversation([*self._system(row), *turns])
        if "instruction" in values:
            return Conversation(self._alpaca_prompt(row))
        columns = ", ".join(("prompt", "instruction", *TURN_COLUMNS))
        raise DataError(
            f"{row.origin}: nothing is before the answer; its prompt should be in one of {columns}, or with the answer "
            f"in HH-RLHF's form, {TRANSCRIPT_FORM}."
        )

    def _transcript(self, row: Row) -> list[dict[str, Any]] | None:
        """The turns of a prompt in HH-RLHF's form, None if the prompt is not."""
        prompt = row.values.get("prompt")
        if not isinstance(prompt, str) or any(row.values.get(name) for name in TURN_COLUMNS):
            return None
        return read_transcript(check_unicode(row, prompt)) if prompt.startswith(TRANSCRIPT_START) else None

    def _spoken(self, row: Row, answer: str) -> dict[str, Any]:
        """An answer in a column of its own; one to a transcript may begin with the blank behind the speaker's mark."""
        return _turn("assistant", read_spoken(answer) if self._transcript(row) else answer)

    def _read_kto(self, row: Row) -> Rated:
        label = row.values.get("label")
        is_good = _verdict(label)
        if is_good is None:
            raise DataError(f"{row.origin}: 'label' should be true or false, not {label!r:.80}.")
        if any(name in row.values for name in TURN_COLUMNS):
            conversation = self._read_turns(row)
        elif isinstance(row.values.get("completion"), str):
            answer = self._spoken(row, _text(row, "completion"))
            conversation = self._follow(self._prompt(row), [answer], None, row)
        elif "completion" in row.values:
            read = self._read_completion(row)
            assert isinstance(read, Conversation)
            conversation = read
        else:
            conversation = self._read_alpaca(row)
        return Rated(conversation, is_good)

    def _read_classification(self, row: Row) -> Labelled:
        label = row.values.get("label")
        if not isinstance(label, str | int):
            raise DataError(f"{row.origin}: 'label' should be a name or a number, not {label!r:.80}.")
        return Labelled(_text(row, "text"), check_unicode(row, str(label)))

    def _read_oasst(self, row: Row) -> Conversation:
        """The best-ranked path through a tree of replies, down to its last answer."""
        for key in TREE_KEYS:  # some of them count only in replies, or name what is there to see
            row.values.get(key)
        node = row.values.get("prompt", row.values)
        path: list[Any] = []
        while node is not None:
            if not isinstance(node, dict):
                raise DataError(f"{row.origin}: a message of a tree should be an object, not {node!r:.80}.")
            path.append(node)
            replies = node.get("replies") or []
            if not isinstance(replies, list):
                raise DataError(f"{row.origin}: 'replies' should be a list of messages, not {replies!r:.80}.")
            replies = [reply for reply in replies if not _is_removed(reply)]
            node = min(replies, key=_rank, default=None)
        messages, weights = self._turns.read_all(row, "prompt", path, TREE_KEYS) if path else ([], None)
        length = max((place for place, turn in enumerate(messages, 1) if turn["role"] == "assistant"), default=0)
        if not length:
            raise DataError(f"{row.origin}: no message of this tree has an answer.")
        return Conversation(messages[:length], weights=weights and weights[:length])

    def _system(self, row: Row) -> list[dict[str, Any]]:
        return [_turn("system", _text(row, "system"))] if row.values.get("system") else []

    def _tools(self, row: Row) -> list[dict[str, Any]] | None:
        return read_tools(row, row.values.get("tools"))


_READERS: dict[str, Any] = {
    "alpaca": RowReader._read_alpaca,
    "sharegpt": RowReader._read_turns,
    "messages": RowReader._read_turns,
    "completion": RowReader._read_completion,
    "text": RowReader._read_text,
    "tokenized": RowReader._read_tokenized,
    "preference": RowReader._read_preference,
    "chosen": RowReader._read_chosen,
    "kto": RowReader._read_kto,
    "classification": RowReader._read_classification,
    "oasst": RowReader._read_oasst,
}


class _Watched(dict[str, Any]):
    """A row's values, which remembers those that were read."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default."""
        self.read.add(name)
        return super().get(name, default)


def _check_media(row: Row) -> None:
    media = [name for name in MEDIA_KEYS if row.values.get(name)]
    if media:
        raise DataError(f"{row.origin}: it has {', '.join(media)}; only text is supported.")


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: column '{column}' should be text, not {value!r:.80}.")
    return check_unicode(row, value)


def _numbers(row: Row, column: str, length: int | None = None) -> list[Any]:
    values = row.values.get(column)
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise DataError(f"{row.origin}: '{column}' should be a list of numbers, not {values!r:.80}.")
    if length is not None and len(values) != length:
        raise DataError(f"{row.origin}: '{column}' has {len(values)} entries, but there are {length} input_ids.")
    return values


def _verdict(label: Any) -> bool | None:
    """What a label says of an answer, None if it is no verdict; a table holds truths as words."""
    if isinstance(label, str):
        return {"true": True, "false": False}.get(label.lower())
    return bool(label) if isinstance(label, int) and label in (0, 1) else None


def _is_removed(reply: Any) -> bool:
    return isinstance(reply, dict) and (reply.get("deleted") is True or reply.get("review_result") is False)


def _rank(reply: Any) -> float:
    rank = reply.get("rank") if isinstance(reply, dict) else None
    return rank if isinstance(rank, int | float) else float("inf")
