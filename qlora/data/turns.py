"""Turns of a conversation, from the dialects of different trainers to the form that chat templates read."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qlora.data.examples import JoinedParts, PartWeights
from qlora.data.masks import DETAILS, OFFSETS, WEIGHT_KEYS, details_of, join_weights, read_details, read_weight
from qlora.data.rows import Row
from qlora.data.values import check_unicode, parse_json
from qlora.errors import DataError

# Names of roles in files, by the role that a chat template knows.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "function_call", "tool_call"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
# Turns with these roles are calls in JSON, as in ShareGPT.
CALLERS = ("function_call", "tool_call")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
PART_KINDS = ("text", "reasoning", "thinking", "tool_call")
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
CALL_KEYS = ("tool_calls", "function_call")
# Keys of a call and of the function in it.
FUNCTION_KEYS = {"id", "type", "function", "name", "arguments", "parameters"}
# Start of a turn in HH-RLHF's text form, which has a conversation as one text.
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
TRANSCRIPT_START = "\n\nHuman:"
TRANSCRIPT_FORM = r"'\n\nHuman: …\n\nAssistant: …' with these marks and LF line ends"
# Keys that are read in turns of every role, and in turns of a tool.
TURN_KEYS = {*REASONING_KEYS, *CALL_KEYS, *WEIGHT_KEYS}
RESULT_KEYS = ("name", "tool_call_id")


class TurnReader:
    """Reads the turns of rows.

    Args:
        columns: Names of a turn's keys in the data, by our names `role` and `content`; other names are ignored.
        roles: Our names of roles, by the names in the data.

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
        """Read a list of turns.

        Args:
            row: The row, for messages.
            column: The column, for messages.
            turns: A list of objects, a single object, or a list of objects as JSON.
            read_elsewhere: Keys of turns that the caller reads.

        Returns:
            The turns with `role`, `content` and, if present, `reasoning_content`, `tool_calls`, `name` and
            `tool_call_id`; and the weight of each, or None if no turn has one.

        Raises:
            DataError: A value is not a turn; the message names the row and the turn.
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
            raise DataError(f"{row.origin}: role {name!r:.80} is unknown; map it with data.roles to one of {known}.")
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
        has_more = bool(called) or any(turn.get(key) for key in (*REASONING_KEYS, *DETAILS))
        weight = read_weight(row, turn)
        largest = max(filter(None, [weight, *(part for *_, part in parts)]), default=0)
        if largest and role != "assistant":
            raise DataError(
                f"{row.origin}: a {role} turn has weight {largest}; only assistant turns can be trained on."
            )
        return message, join_weights(row, weight, parts, has_more)

    def _note_unread(self, values: dict[str, Any], known: set[str]) -> None:
        self.unread |= {key for key, value in values.items() if key not in known and value is not None}

    def _call(self, row: Row, call: Any) -> dict[str, Any]:
        """Read a call, with its arguments as an object, since templates would quote a JSON string."""
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{row.origin}: a tool call should have 'name' and 'arguments', not {call!r:.80}.")
        for values in (call, function):
            if read_weight(row, values) is not None:
                raise DataError(f"{row.origin}: a call has a weight; set the weight of the whole turn instead.")
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
        """Join the parts of a content: with line breaks, or without any if a part has a weight.

        Returns:
            `content` and, if present, `reasoning_content`; place and weight of each part if one has a weight; and
            calls.
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
                    raise DataError(
                        f"{row.origin}: a part that is a call has a weight; set the weight of the whole turn instead."
                    )
            else:
                key = "content" if kind == "text" else "reasoning_content"
                texts[key].append((check_unicode(row, value), weight))
        is_weighted = any(weight is not None for weight in weights)
        join = "".join if is_weighted else JoinedParts
        joined = {key: join(text for text, _ in pieces) for key, pieces in texts.items()}
        places: list[tuple[str, int, int, float | None]] = []
        for key, pieces in texts.items() if is_weighted else ():
            begin = 0
            for text, own in pieces:
                places.append((key, begin, begin + len(text), own))
                begin += len(text)
        if not texts["reasoning_content"]:
            del joined["reasoning_content"]
        return joined, places, calls


def read_tools(row: Row, tools: Any) -> list[dict[str, Any]] | None:
    """Read the descriptions of a conversation's tools into the form that chat templates read; None if it has none."""
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(row, "tools", tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{row.origin}: 'tools' should be a list of objects, not {tools!r:.80}.")
    _check_nested(row, tools)
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def read_transcript(text: str) -> list[dict[str, Any]] | None:
    """Read a conversation in HH-RLHF's text form, `\\n\\nHuman: …\\n\\nAssistant: …`.

    Returns:
        Its turns, without the empty answer at the end of a prompt; None if the text is not in this form.
    """
    before, *pieces = SPEAKER.split(text)
    if before or pieces[:1] != ["Human"]:
        return None
    spoken = zip(pieces[::2], map(read_spoken, pieces[1::2]), strict=True)
    turns = [{"role": ROLE_OF[name.lower()], "content": content} for name, content in spoken]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def read_spoken(text: str) -> str:
    """Read the text after a speaker's mark in HH-RLHF's text form.

    Removes the blank after the mark, blank lines in front, and blanks at the end; keeps the first line's indentation.
    """
    return re.sub(r"\A ?(?:[^\S\n]*\n)*", "", text).rstrip()


def _only_one(row: Row, given: Mapping[str, Any]) -> Any:
    """Return the value of a turn's keys with the same meaning: the first that is not empty.

    Raises:
        DataError: Two of them differ, so one would be lost.
    """
    filled = {key: value for key, value in given.items() if value}
    first = next((value for value in (filled or given).values() if value is not None), None)
    if any(value != first for value in filled.values()):
        raise DataError(f"{row.origin}: {' and '.join(filled)} of a turn differ; keep one of them.")
    return first


def _check_nested(row: Row, value: Any) -> None:
    """Check that all text anywhere in a value can be encoded."""
    check_unicode(row, json.dumps(value, ensure_ascii=False, default=str))
