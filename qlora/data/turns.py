"""Turns of a conversation in the dialects there are, to the one that chat templates read."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qlora.data.examples import JoinedParts, PartWeights
from qlora.data.masks import DETAILS, OFFSETS, WEIGHT_KEYS, details_of, join_weights, read_details, read_weight
from qlora.data.rows import Row
from qlora.errors import DataError
from qlora.files.json_values import parse_value

# Names of speakers in files, by the role that a chat template knows.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "function_call", "tool_call"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
# Turns of these speakers are calls in JSON, as ShareGPT writes them.
CALLERS = ("function_call", "tool_call")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
PART_KINDS = ("text", "reasoning", "thinking", "tool_call")
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
CALL_KEYS = ("tool_calls", "function_call")
# Keys of a call and of the function in it.
FUNCTION_KEYS = {"id", "type", "function", "name", "arguments", "parameters"}
# How a turn begins in HH-RLHF's text form, which holds a conversation as one text.
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
TRANSCRIPT_START = "\n\nHuman:"
TRANSCRIPT_FORM = r"'\n\nHuman: …\n\nAssistant: …' with these marks and LF line ends"
# Keys of a turn that are read, whatever its role; and of a turn of a tool.
TURN_KEYS = {*REASONING_KEYS, *CALL_KEYS, *WEIGHT_KEYS}
RESULT_KEYS = ("name", "tool_call_id")


class TurnReader:
    """Reads the turns of rows.

    Args:
        columns: Our name of a turn's key, `role` or `content`, to theirs.
        roles: Their name of a speaker to ours.

    Attributes:
        unread: Keys of turns and of their parts that nothing read, over all rows.
    """

    def __init__(self, columns: Mapping[str, str], roles: Mapping[str, str]) -> None:
        self._role_keys = (columns["role"],) if "role" in columns else ROLE_KEYS
        self._content_keys = (columns["content"],) if "content" in columns else CONTENT_KEYS
        self._role_of = ROLE_OF | dict(roles)
        self.unread: set[str] = set()

    def read_all(
        self, row: Row, column: str, turns: Any, read_elsewhere: Iterable[str] = ()
    ) -> tuple[list[dict[str, Any]], list[float | PartWeights] | None]:
        """Reads a list of turns.

        Args:
            row: The row that holds them.
            column: Where in it.
            turns: A list of objects, one such object, or such a list as JSON.
            read_elsewhere: Keys of turns that the caller reads.

        Returns:
            The turns with `role`, `content` and, where there are such, `reasoning_content`, `tool_calls`, `name` and
            `tool_call_id`; and the weight of each, or None if no turn has one.

        Raises:
            DataError: They are no turns; the row and the turn are named.
        """
        if isinstance(turns, str):  # a table holds lists as JSON
            turns = parse_json(row, column, turns)
        if isinstance(turns, dict):
            turns = [turns]
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{row.origin}: '{column}' should be a list of turns, not {turns!r:.80}.")
        messages, weights = zip(*(self._read(row, turn, read_elsewhere) for turn in turns), strict=True)
        has_weights = any(weight is not None for weight in weights)
        return list(messages), [1.0 if w is None else w for w in weights] if has_weights else None

    def _read(
        self, row: Row, turn: Any, read_elsewhere: Iterable[str]
    ) -> tuple[dict[str, Any], float | PartWeights | None]:
        if not isinstance(turn, dict):
            raise DataError(f"{row.origin}: a turn should have 'role' and 'content', not {turn!r:.80}.")
        if turn.keys().isdisjoint(self._role_keys):
            keys = " or ".join(f"'{key}'" for key in self._role_keys)
            raise DataError(f"{row.origin}: a turn has no {keys}: {turn!r:.80}; map its keys with data.columns.")
        name = next(turn[key] for key in self._role_keys if key in turn)
        role = self._role_of.get(name) if isinstance(name, str) else None
        if role not in ROLES:
            known = ", ".join(sorted(self._role_of))
            raise DataError(f"{row.origin}: role {name!r:.80} is none of {known}; map it with data.roles.")
        media = [key for key in MEDIA_KEYS if turn.get(key)]
        if media:
            raise DataError(f"{row.origin}: a turn has {', '.join(media)}; only text is supported.")
        content = _only_one(row, {key: turn[key] for key in self._content_keys if key in turn})
        calls = {key: turn[key] for key in CALL_KEYS if turn.get(key)}
        if name in CALLERS and isinstance(content, str | dict | list):
            calls[name] = parse_json(row, f"{name} turn", content) if isinstance(content, str) else content
            content = None
        if content is None and not any(calls.values()):
            raise DataError(f"{row.origin}: a turn should have 'role' and a text 'content', not {turn!r:.80}.")
        message: dict[str, Any] = {"role": role, "content": ""}
        parts: list[tuple[str, int, int, float | None]] = []
        if isinstance(content, list):
            joined, parts, calls["a part that is a call"] = self._join_parts(row, content)
            message |= joined
        elif content is not None:
            message["content"] = check_unicode(row, content)
        parts += read_details(row, turn, message["content"])
        for _, detail in details_of(turn):
            self._note_unread(detail, {*OFFSETS, *WEIGHT_KEYS})
        in_parts = {"a part of reasoning": message.get("reasoning_content")}
        reasoning = _only_one(row, {key: turn.get(key) for key in REASONING_KEYS} | in_parts)
        if reasoning:
            message["reasoning_content"] = check_unicode(row, reasoning)
        read_calls = {
            key: [self._call(row, call) for call in (given if isinstance(given, list) else [given])]
            for key, given in calls.items()
            if given
        }
        if called := _only_one(row, read_calls):
            message["tool_calls"] = called
        if role == "tool":
            known_keys = [key for key in RESULT_KEYS if isinstance(turn.get(key), str)]
            message |= {key: check_unicode(row, turn[key]) for key in known_keys}
        read = {
            *self._role_keys,
            *self._content_keys,
            *TURN_KEYS,
            *(RESULT_KEYS if role == "tool" else ()),
            *read_elsewhere,
        }
        self._note_unread(turn, read)
        says_more = bool(called) or any(turn.get(key) for key in (*REASONING_KEYS, *DETAILS))
        weight = read_weight(row, turn)
        largest = max(filter(None, [weight, *(part for *_, part in parts)]), default=0)
        if largest and role != "assistant":
            raise DataError(f"{row.origin}: a {role} turn has weight {largest}; only answers can be learned.")
        return message, join_weights(row, weight, parts, says_more)

    def _note_unread(self, values: dict[str, Any], known: set[str]) -> None:
        self.unread |= {key for key, value in values.items() if key not in known and value is not None}

    def _call(self, row: Row, call: Any) -> dict[str, Any]:
        """A call with its arguments as an object: templates write a string of JSON as a string."""
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{row.origin}: a tool call should have 'name' and 'arguments', not {call!r:.80}.")
        for values in (call, function):
            if read_weight(row, values) is not None:
                raise DataError(f"{row.origin}: a call has a weight; give it to the whole turn.")
            self._note_unread(values, FUNCTION_KEYS)
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = parse_json(row, "arguments", arguments or "{}")
        if not isinstance(arguments, dict | None):
            raise DataError(f"{row.origin}: a tool call's arguments should be an object, not {arguments!r:.80}.")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read = {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        _check_nested(row, read)
        return read

    def _join_parts(
        self, row: Row, parts: list[Any]
    ) -> tuple[dict[str, Any], list[tuple[str, int, int, float | None]], list[Any]]:
        """Joins the parts of a content, without anything between them if one has a weight, since they are then
        stretches of one text.

        Returns:
            `content` and, where there is such, `reasoning_content`; each part's place and weight, if one has a weight;
            and calls.
        """
        texts: dict[str, list[tuple[str, float | None]]] = {"content": [], "reasoning_content": []}
        calls, weights = [], []
        for part in parts:
            if isinstance(part, str):
                part = {"text": part}
            if not isinstance(part, dict):
                raise DataError(f"{row.origin}: a part of a turn should be text or an object, not {part!r:.80}.")
            kind = part.get("type", "text")
            if kind not in PART_KINDS:
                raise DataError(f"{row.origin}: a part of a turn is of type {kind!r:.80}; only text is supported.")
            value = next((part[key] for key in ("text", "value", kind) if key in part), None)
            weight = read_weight(row, part)
            weights.append(weight)
            self._note_unread(part, {"type", "text", "value", kind, *WEIGHT_KEYS})
            if kind == "tool_call":
                calls.append(parse_json(row, kind, value) if isinstance(value, str) else value)
                if weight is not None:
                    raise DataError(f"{row.origin}: a part that is a call has a weight; give it to the whole turn.")
            else:
                key = "content" if kind == "text" else "reasoning_content"
                texts[key].append((check_unicode(row, value), weight))
        is_weighted = any(weight is not None for weight in weights)
        join = "".join if is_weighted else JoinedParts
        joined = {key: join(text for text, _ in said) for key, said in texts.items()}
        places: list[tuple[str, int, int, float | None]] = []
        for key, said in texts.items() if is_weighted else ():
            begin = 0
            for text, own in said:
                places.append((key, begin, begin + len(text), own))
                begin += len(text)
        if not texts["reasoning_content"]:
            del joined["reasoning_content"]
        return joined, places, calls


def read_tools(row: Row, tools: Any) -> list[dict[str, Any]] | None:
    """The descriptions of tools that a conversation may use, as chat templates read them; None if there are none."""
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(row, "tools", tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{row.origin}: 'tools' should be a list of objects, not {tools!r:.80}.")
    _check_nested(row, tools)
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def read_transcript(text: str) -> list[dict[str, Any]] | None:
    """Reads a conversation in HH-RLHF's text form, `\\n\\nHuman: …\\n\\nAssistant: …`.

    Returns:
        Its turns, without an empty answer at the end, as a prompt has one; None if the text is not in this form.
    """
    before, *pieces = SPEAKER.split(text)
    if before or pieces[:1] != ["Human"]:
        return None
    said = zip(pieces[::2], map(read_spoken, pieces[1::2]), strict=True)
    turns = [{"role": ROLE_OF[name.lower()], "content": content} for name, content in said]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def read_spoken(text: str) -> str:
    """What is said behind a speaker's mark in HH-RLHF's text form: the text without the blank behind the mark, blank
    lines in front, and blanks at the end; an indented first line stays so.
    """
    return re.sub(r"\A ?(?:[^\S\n]*\n)*", "", text).rstrip()


def parse_json(row: Row, name: str, text: str) -> Any:
    """Parses JSON inside a column.

    Raises:
        DataError: It is none.
    """
    try:
        return parse_value(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{row.origin}: '{name}' should be JSON, not {text!r:.80} ({error}).") from None


def check_unicode(row: Row, text: Any) -> str:
    """Check that a value is text that can be encoded: JSON can hold halves of a surrogate pair, which break tokenizers.

    Raises:
        DataError: It is not.
    """
    if not isinstance(text, str):
        raise DataError(f"{row.origin}: a turn's content should be text or parts, not {text!r:.80}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.origin}: character {error.start} of {text!r:.40} is half a surrogate pair.") from None
    return text


def _only_one(row: Row, given: Mapping[str, Any]) -> Any:
    """The value of a turn's keys that mean the same; the first that is not empty.

    Raises:
        DataError: Two of them differ, so one would be lost.
    """
    said = {key: value for key, value in given.items() if value}
    first = next((value for value in (said or given).values() if value is not None), None)
    if any(value != first for value in said.values()):
        raise DataError(f"{row.origin}: {' and '.join(said)} of a turn differ; keep one of them.")
    return first


def _check_nested(row: Row, value: Any) -> None:
    """Check that all text in a value can be encoded, wherever it is."""
    check_unicode(row, json.dumps(value, ensure_ascii=False, default=str))
