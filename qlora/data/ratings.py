"""Rows with rated answers: preference pairs, their chosen answers, and KTO's good and bad answers."""

import math
from typing import Any

from qlora.data.conversations import (
    TURN_COLUMNS,
    extend,
    read_alpaca,
    read_completion,
    read_prompt,
    read_transcript_prompt,
    read_turns,
    system_turns,
    turn,
)
from qlora.data.examples import Conversation, PartWeights, Preference, Rated
from qlora.data.rows import Row
from qlora.data.turns import TRANSCRIPT_START, TurnReader, read_spoken, read_transcript
from qlora.data.values import check_unicode, text_of
from qlora.errors import DataError

# Column of a pair, and of the documents of its store: see :class:`qlora.data.examples.Preference`.
MARGIN = "margin"


def read_preference(turns: TurnReader, row: Row) -> Preference:
    """Read `chosen` and `rejected`, each after the same prompt, and `margin` where it is given."""
    chosen, rejected = (_read_answered(turns, row, name) for name in ("chosen", "rejected"))
    return Preference(chosen, rejected, _read_margin(row))


def _read_margin(row: Row) -> float:
    value = row.values.get(MARGIN)
    if value is None or value == "":
        return 0.0
    try:
        margin = float("nan" if isinstance(value, bool) else value)  # tables have numbers as text
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(f"{row.origin}: '{MARGIN}' should be a number, not {value!r:.80}.")
    return margin


def read_chosen(turns: TurnReader, row: Row) -> Conversation:
    """Read `chosen` alone."""
    return _read_answered(turns, row, "chosen")


def _read_answered(turns: TurnReader, row: Row, name: str) -> Conversation:
    """Read a column that is an answer or a whole conversation, with the prompt if it is an answer."""
    values = row.values
    answer = values.get(f"{name}_messages", values.get(name))
    messages: list[dict[str, Any]] | None
    weights: list[float | PartWeights] | None = None
    if isinstance(answer, str):
        messages = read_transcript(check_unicode(row, answer))
        if not messages or not answer.startswith(TRANSCRIPT_START) and _has_prompt(row):
            messages = [_answer_turn(row, answer)]
    else:
        messages, weights = turns.read_all(row, name, answer)
    if messages[0]["role"] == "assistant":
        return extend(read_prompt(turns, row), messages, weights, row)
    # It has the whole conversation; the other columns then repeat its prompt.
    system = [] if messages[0]["role"] == "system" else system_turns(row)
    return extend(Conversation(system), messages, weights, row)


def _has_prompt(row: Row) -> bool:
    return not row.values.keys().isdisjoint({*TURN_COLUMNS, "prompt", "instruction"})


def _answer_turn(row: Row, answer: str) -> dict[str, Any]:
    """Read an answer in a column of its own; after a transcript it may begin with the blank after a speaker's mark."""
    return turn("assistant", read_spoken(answer) if read_transcript_prompt(row) else answer)


def read_kto(turns: TurnReader, row: Row) -> Rated:
    """Read a conversation in any form, and `label`."""
    label = row.values.get("label")
    is_good = verdict_of(label)
    if is_good is None:
        raise DataError(f"{row.origin}: 'label' should be true or false, not {label!r:.80}.")
    if any(name in row.values for name in TURN_COLUMNS):
        conversation = read_turns(turns, row)
    elif isinstance(row.values.get("completion"), str):
        answer = _answer_turn(row, text_of(row, "completion"))
        conversation = extend(read_prompt(turns, row), [answer], None, row)
    elif "completion" in row.values:
        read = read_completion(turns, row)
        assert isinstance(read, Conversation)
        conversation = read
    else:
        conversation = read_alpaca(turns, row)
    return Rated(conversation, is_good)


def verdict_of(label: Any) -> bool | None:
    """Return the rating that a label stands for, or None if it is not one; tables have booleans as words."""
    if isinstance(label, str):
        return {"true": True, "false": False}.get(label.lower())
    return bool(label) if isinstance(label, int) and label in (0, 1) else None
