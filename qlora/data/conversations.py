"""Rows that are conversations: Alpaca, turns, prompt and completion, OpenAssistant's trees."""

from typing import Any

from qlora.data.examples import Completion, Conversation, PartWeights
from qlora.data.rows import Row
from qlora.data.turns import TRANSCRIPT_FORM, TRANSCRIPT_START, TurnReader, read_tools, read_transcript
from qlora.data.values import check_unicode, parse_json, text_of
from qlora.errors import DataError

TURN_COLUMNS = ("messages", "conversations", "conversation")
# Keys of a message in a tree that say where it is and whether it counts.
TREE_KEYS = ("message_tree_id", "message_id", "replies", "rank", "deleted", "review_result")


def read_alpaca(_turns: TurnReader, row: Row) -> Conversation:
    """Read `instruction` with `input` and `history`, and `output` or `response`."""
    if row.values.keys().isdisjoint({"output", "response"}):
        raise DataError(f"{row.origin}: there is neither 'output' nor 'response'.")
    answer = text_of(row, "output" if "output" in row.values else "response")
    return Conversation([*_alpaca_prompt(row), turn("assistant", answer)], read_tool_column(row))


def _alpaca_prompt(row: Row) -> list[dict[str, Any]]:
    values = row.values
    messages = system_turns(row)
    history = values.get("history") or []
    if isinstance(history, str):  # tables have lists as JSON
        history = parse_json(row, "history", history)
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"{row.origin}: 'history' should have pairs of question and answer, not {pair!r:.80}.")
        question, answer = (check_unicode(row, text) for text in pair)
        messages += [turn("user", question), turn("assistant", answer)]
    instruction = text_of(row, "instruction")
    extra = text_of(row, "input") if values.get("input") else ""
    return [*messages, turn("user", f"{instruction}\n\n{extra}" if extra else instruction)]


def read_turns(turns: TurnReader, row: Row) -> Conversation:
    """Read a list of turns in one of `TURN_COLUMNS`."""
    column = next((name for name in TURN_COLUMNS if name in row.values), "messages")
    messages, weights = turns.read_all(row, column, row.values.get(column))
    return extend(Conversation(system_turns(row)), messages, weights, row)


def read_completion(turns: TurnReader, row: Row) -> Conversation | Completion:
    """Read `prompt` and `completion`: texts, or lists of turns."""
    prompt, completion = row.values.get("prompt"), row.values.get("completion")
    if not isinstance(prompt, list):
        return Completion(text_of(row, "prompt"), text_of(row, "completion"))
    if not isinstance(completion, list):
        raise DataError(f"{row.origin}: 'completion' should be turns, as 'prompt' is, not {completion!r:.80}.")
    messages, weights = turns.read_all(row, "prompt", [*prompt, *completion])
    return Conversation(messages, read_tool_column(row), weights)


def read_oasst(turns: TurnReader, row: Row) -> Conversation:
    """Read the best-ranked path through a tree of replies, down to its last answer."""
    for key in TREE_KEYS:  # all are known, even if only replies use them
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
    messages, weights = turns.read_all(row, "prompt", path, TREE_KEYS) if path else ([], None)
    length = max((place for place, message in enumerate(messages, 1) if message["role"] == "assistant"), default=0)
    if not length:
        raise DataError(f"{row.origin}: no message of this tree has an answer.")
    return Conversation(messages[:length], weights=weights and weights[:length])


def _is_removed(reply: Any) -> bool:
    return isinstance(reply, dict) and (reply.get("deleted") is True or reply.get("review_result") is False)


def _rank(reply: Any) -> float:
    rank = reply.get("rank") if isinstance(reply, dict) else None
    return rank if isinstance(rank, int | float) else float("inf")


def read_prompt(turns: TurnReader, row: Row) -> Conversation:
    """Read the turns before an answer, from turns, `prompt` or `instruction`."""
    values = row.values
    column = next((name for name in TURN_COLUMNS if values.get(name)), "prompt")
    if column != "prompt" or isinstance(values.get("prompt"), list):
        messages, weights = turns.read_all(row, column, values[column])
        return extend(Conversation(system_turns(row)), messages, weights, row)
    if "prompt" in values:
        messages = read_transcript_prompt(row) or [turn("user", text_of(row, "prompt"))]
        return Conversation([*system_turns(row), *messages])
    if "instruction" in values:
        return Conversation(_alpaca_prompt(row))
    columns = ", ".join(("prompt", "instruction", *TURN_COLUMNS))
    raise DataError(
        f"{row.origin}: there is nothing before the answer; put its prompt into one of {columns}, or before the answer "
        f"in HH-RLHF's form, {TRANSCRIPT_FORM}."
    )


def read_transcript_prompt(row: Row) -> list[dict[str, Any]] | None:
    """Read a prompt in HH-RLHF's form; return None if it has another form."""
    prompt = row.values.get("prompt")
    if not isinstance(prompt, str) or any(row.values.get(name) for name in TURN_COLUMNS):
        return None
    return read_transcript(check_unicode(row, prompt)) if prompt.startswith(TRANSCRIPT_START) else None


def extend(
    prompt: Conversation, messages: list[dict[str, Any]], weights: list[float | PartWeights] | None, row: Row
) -> Conversation:
    """Append turns to those of a prompt, with the row's tools."""
    joined = None
    if prompt.weights or weights:
        joined = [*(prompt.weights or [1.0] * len(prompt.messages)), *(weights or [1.0] * len(messages))]
    return Conversation([*prompt.messages, *messages], read_tool_column(row), joined)


def turn(role: str, content: str) -> dict[str, Any]:
    """Return a turn in the form that chat templates read."""
    return {"role": role, "content": content}


def system_turns(row: Row) -> list[dict[str, Any]]:
    """Read the `system` column as a turn, if there is one."""
    return [turn("system", text_of(row, "system"))] if row.values.get("system") else []


def read_tool_column(row: Row) -> list[dict[str, Any]] | None:
    """Read the `tools` column."""
    return read_tools(row, row.values.get("tools"))
