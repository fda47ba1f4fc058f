"""Weights and masks of turns and parts of turns, as different trainers write them."""

from typing import Any

from qlora.data.examples import PartWeights
from qlora.data.rows import Row
from qlora.errors import DataError

# Keys of a turn or a part. Numbers are weights; flags are true or false, or 1 or 0.
NUMBERS = ("weight", "loss_weight", "loss_scale", "train", "training")
FLAGS = ("loss", "loss_mask", "trainable")
MASKED = "masked"
# Spans of a turn's content, `{begin_offset, end_offset, train}` each; the last character is included.
DETAILS = ("train_detail", "training_detail")
OFFSETS = ("begin_offset", "end_offset")
WEIGHT_KEYS = (*NUMBERS, *FLAGS, MASKED, *DETAILS)


def read_weight(row: Row, values: dict[str, Any]) -> float | None:
    """Read the weight of a turn or of a part of one.

    Args:
        row: The row, for messages.
        values: The turn or the part.

    Returns:
        The weight, or None if no key gives one.

    Raises:
        DataError: A value is not a weight, or two keys disagree.
    """
    given = {key: check_weight(row, values[key]) for key in NUMBERS if values.get(key) is not None}
    given |= {key: float(_flag(row, key, values[key])) for key in FLAGS if values.get(key) is not None}
    if values.get(MASKED) is not None and _flag(row, MASKED, values[MASKED]):
        given[MASKED] = 0.0
    if len(set(given.values())) > 1:
        keys = " and ".join(f"'{key}': {values[key]!r}" for key in given)
        raise DataError(f"{row.origin}: {keys} disagree on whether this is trained on; keep one of them.")
    return next(iter(given.values()), None)


def read_details(row: Row, turn: dict[str, Any], content: str) -> list[tuple[str, int, int, float]]:
    """Read the spans of a turn's content that have a weight of their own, in the form of :class:`PartWeights`.

    Raises:
        DataError: A span is not in the content.
    """
    parts = []
    for key, detail in details_of(turn):
        begin, end, weight = _detail(row, key, detail)
        if not 0 <= begin <= end < len(content):
            raise DataError(
                f"{row.origin}: '{key}' has characters {begin} to {end}, but the content has {len(content)}."
            )
        parts.append(("content", begin, end + 1, weight))
    return parts


def details_of(turn: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the spans that a turn gives, each with its key."""
    given = {key: turn.get(key) or [] for key in DETAILS}
    return [(key, one) for key, found in given.items() for one in (found if isinstance(found, list) else [found])]


def _detail(row: Row, key: str, detail: Any) -> tuple[int, int, float]:
    if isinstance(detail, dict):
        (begin, end), weight = map(detail.get, OFFSETS), read_weight(row, detail)
        if type(begin) is int and type(end) is int and weight is not None:
            return begin, end, weight
    raise DataError(f"{row.origin}: '{key}' should have begin_offset, end_offset and train, not {detail!r:.80}.")


def join_weights(
    row: Row, weight: float | None, parts: list[tuple[str, int, int, float | None]], has_more: bool
) -> float | PartWeights | None:
    """Join the weight of a turn with those of its parts.

    Args:
        row: The row, for messages.
        weight: Weight of the turn, or None.
        parts: Parts in the form of :class:`PartWeights`; None for a part without a weight of its own.
        has_more: Whether the turn has something outside its parts, such as a call.

    Raises:
        DataError: Two parts overlap, and their weights disagree.
    """
    _check_overlaps(row, [(key, begin, end, part) for key, begin, end, part in parts if part is not None])
    rest = 1.0 if weight is None else weight
    own = [(key, begin, end, rest if part is None else part) for key, begin, end, part in parts]
    different = {part for *_, part in own} - {rest}
    if not different:
        return weight
    if len(different) == 1 and not has_more and all(part != rest for *_, part in own):
        return different.pop()
    return PartWeights(own, rest)


def _check_overlaps(row: Row, parts: list[tuple[str, int, int, float]]) -> None:
    last: tuple[str, int, int, float] = ("", 0, 0, 0.0)  # the one of those before that ends last
    for part in sorted(parts):
        key, begin, end, weight = part
        overlaps = key == last[0] and begin < last[2]
        if overlaps and weight != last[3]:
            raise DataError(
                f"{row.origin}: two masks of one turn disagree on characters {begin} to {min(end, last[2]) - 1} of its "
                f"{key}, with weights {last[3]} and {weight}; keep one of them."
            )
        if not overlaps or end > last[2]:
            last = part


def check_weight(row: Row, weight: Any) -> float:
    """Check that a weight can be stored in fp16: 0, or from 0.001 to 1000.

    Raises:
        DataError: It is anything else.
    """
    if not isinstance(weight, int | float) or not (weight == 0 or 0.001 <= weight <= 1000):
        raise DataError(f"{row.origin}: a weight should be 0, or a number from 0.001 to 1000, not {weight!r:.80}.")
    return float(weight)


def _flag(row: Row, key: str, value: Any) -> bool:
    if not isinstance(value, int | float) or value not in (0, 1):
        raise DataError(f"{row.origin}: '{key}' should be true or false, or 1 or 0, not {value!r:.80}.")
    return bool(value)
