"""Rows that are read without a chat template: text, token ids, labelled text and labelled images."""

from pathlib import Path
from typing import Any

from qlora.data.examples import Completion, Labelled, LabelledImage, Tokens
from qlora.data.masks import check_weight
from qlora.data.rows import Row
from qlora.data.turns import TurnReader
from qlora.data.values import check_unicode, numbers_of, text_of
from qlora.errors import DataError

IGNORED_LABEL = -100


def read_text(_turns: TurnReader, row: Row) -> Completion:
    """Read `text`."""
    return Completion("", text_of(row, "text"))


def read_tokenized(_turns: TurnReader, row: Row) -> Tokens:
    """Read `input_ids` with `loss_mask` or `labels`; positions that `attention_mask` excludes are removed."""
    ids = numbers_of(row, "input_ids")
    if not ids:
        raise DataError(f"{row.origin}: 'input_ids' is empty.")
    weights = [1.0] * len(ids)
    if row.values.get("loss_mask") is not None:
        weights = [check_weight(row, weight) for weight in numbers_of(row, "loss_mask", len(ids))]
    elif row.values.get("labels") is not None:
        labels = numbers_of(row, "labels", len(ids))
        for place, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if label not in (IGNORED_LABEL, token):
                raise DataError(
                    f"{row.origin}: label {place} is {label}, neither input id {token} nor {IGNORED_LABEL}; labels "
                    "should be the ids themselves, not shifted."
                )
        weights = [float(label != IGNORED_LABEL) for label in labels]
    is_padding = [False] * len(ids)
    if row.values.get("attention_mask") is not None:
        is_padding = [not attended for attended in numbers_of(row, "attention_mask", len(ids))]
    kept = [place for place in range(len(ids)) if not is_padding[place]]
    return Tokens([ids[place] for place in kept], [weights[place] for place in kept])


def read_classification(_turns: TurnReader, row: Row) -> Labelled:
    """Read `text` and `label`: a name, a whole number, or a list of them."""
    return Labelled(text_of(row, "text"), *_labels(row))


def read_image(_turns: TurnReader, row: Row) -> LabelledImage:
    """Read `image` and `label`, which is as for texts; a relative path is left as it is."""
    return LabelledImage(image_of(row, "image"), *_labels(row))


def image_of(row: Row, column: str) -> Path | bytes:
    """Read a column with an image: a path, bytes, or both as datasets of Hugging Face have them.

    Raises:
        DataError: It is absent or of another kind.
    """
    value = row.values.get(column)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise DataError(
            f"{row.origin}: column '{column}' should be the path of an image, or its bytes, not {value!r:.80}."
        )
    try:
        return Path(check_unicode(row, value)).expanduser()
    except RuntimeError:
        raise DataError(f"{row.origin}: {value} names a home folder that does not exist.") from None


def _labels(row: Row) -> tuple[tuple[str, ...], bool]:
    """Return the names of a row's labels, and whether they are a list."""
    value = row.values.get("label")
    labels = (_label(row, each) for each in (value if isinstance(value, list) else [value]))
    return tuple(dict.fromkeys(labels)), isinstance(value, list)


def _label(row: Row, value: Any) -> str:
    is_whole = isinstance(value, float) and value.is_integer()  # tables without a value somewhere turn numbers into it
    if not (isinstance(value, str) and value.strip() or type(value) is int or is_whole):
        raise DataError(
            f"{row.origin}: 'label' should be a name or a whole number, or a list of them, not {value!r:.80}."
        )
    return check_unicode(row, str(int(value) if is_whole else value).strip())
