"""Labels of classification: their names, and the words that a model answers with."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix
from typing import Any

import numpy as np

from qlora.data.examples import Labelled, LabelledImage
from qlora.data.formats import COLUMNS, RowReader
from qlora.data.rows import Row, read_rows
from qlora.data.sources import Source
from qlora.data.store import Column
from qlora.data.tables import HeaderRule
from qlora.errors import ConfigError, DataError

LABEL = "label"
BY_HEAD, BY_TOKENS = "head", "tokens"
# Number of labels that a message names.
SHOWN_LABELS = 12


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a classification, in the order of their numbers.

    Attributes:
        names: Name of each label.
        by: How a label is predicted: by a `head`, a score of each label, or by `tokens`, the words that the model
            answers with.
        words: The word that stands for each label in an answer; None chooses them by the tokenizer. Unused by `head`.
        is_multiple: Whether a text can have several labels, or none.
        answers: Token ids of each label's answer, up to the end of the turn; empty until a tokenizer gave them.
    """

    names: tuple[str, ...]
    by: str
    words: tuple[str, ...] | None = None
    is_multiple: bool = False
    answers: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check the names and words.

        Raises:
            ConfigError: There are fewer than two labels (one, if a text can have several), a name or word is not
                unique, or labels by their words are not exclusive.
        """
        if len(self.names) < (1 if self.is_multiple else 2):
            raise ConfigError(
                f"A classification needs two labels or more, but there is {self.names[0]!r} alone; add rows with "
                "another label, or name all labels in data.labels."
                if self.names
                else "No row has a label to learn. Classification reads rows with the columns text (or image) and "
                "label; data.columns maps others."
            )
        for what, values in (("label", self.names), ("word", self.words or ())):
            if repeated := sorted({value for value in values if values.count(value) > 1}):
                raise ConfigError(f"data.labels: the {what} {repeated[0]!r} occurs twice; each label needs its own.")
        if self.is_multiple and self.by == BY_TOKENS:
            raise ConfigError(
                "train.classify_by: tokens answers with a single label, but the rows have lists of labels; set "
                "train.classify_by: head, or give each row one label."
            )

    @property
    def offset(self) -> int:
        """Number of tokens that the answers of all labels begin with, before the one that decides."""
        return len(commonprefix([list(answer) for answer in self.answers]))

    @property
    def deciding(self) -> tuple[int, ...]:
        """The token of each label's answer that decides on it."""
        return tuple(answer[min(self.offset, len(answer) - 1)] for answer in self.answers)

    def column(self) -> Column:
        """Return the column that a store has for them: a number, or a 1 for each label of several."""
        return Column(LABEL, f"({len(self.names)},)uint8" if self.is_multiple else "int32", "document")

    def number(self, name: str) -> int:
        """Return the number of a label.

        Raises:
            DataError: There is no such label.
        """
        if name not in self.names:
            raise DataError(
                f"its label {name!r} is none of those to learn, {describe_names(self.names)}; labels come from the "
                "training rows, unless data.labels names them."
            )
        return self.names.index(name)

    def value(self, names: Sequence[str]) -> Any:
        """Return a document's entry in :meth:`column`.

        Args:
            names: Names of its labels.

        Raises:
            DataError: A label is none of these, or the document does not have exactly one where it should.
        """
        if self.is_multiple:
            return np.isin(np.arange(len(self.names)), [self.number(name) for name in names]).astype(np.uint8)
        if len(names) != 1:
            raise DataError(f"it has {len(names)} labels; a row has one here.")
        return np.int32(self.number(names[0]))

    def as_dict(self) -> dict[str, Any]:
        """Return names and words as JSON values, which :func:`labels_from_dict` reads."""
        words = self.words or [None] * len(self.names)
        labels = [{"name": name, "word": word} for name, word in zip(self.names, words, strict=True)]
        return {"by": self.by, "is_multiple": self.is_multiple, "labels": labels}


def labels_from_dict(values: Mapping[str, Any]) -> Labels:
    """Read what :meth:`Labels.as_dict` returned.

    Raises:
        ValueError: It is damaged.
    """
    try:
        names, words = zip(*[(each["name"], each["word"]) for each in values["labels"]], strict=True)
        by, is_multiple = values["by"], values["is_multiple"]
        has_words = by == BY_TOKENS
        if by not in (BY_HEAD, BY_TOKENS) or not all(isinstance(each, str) for each in (*names, *words * has_words)):
            raise ValueError("names or words of labels")
        return Labels(names, by, words if has_words else None, bool(is_multiple))
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ValueError(f"no labels: {error!r}") from None


def find_labels(sources: Sequence[Source], by: str, names: Sequence[str] | Mapping[str, str] | None = None) -> Labels:
    """Return the labels of sources' rows, sorted, or those that are given by name.

    Args:
        sources: Sources of the training rows; rows that can't be read are left out here.
        by: See :class:`Labels`.
        names: Names in the order of the labels' numbers; or the word for each name.

    Raises:
        ConfigError: The labels can't be told apart, see :class:`Labels`.
        DataError: A source can't be read.
    """
    found: set[str] = set()
    is_multiple = False
    for example in _labelled(sources):
        found.update(example.labels)
        is_multiple = is_multiple or example.is_list
    words = tuple(names.values()) if isinstance(names, Mapping) and by == BY_TOKENS else None
    return Labels(tuple(names or sorted(found, key=_sort_key)), by, words, is_multiple)


def describe_names(names: Sequence[str]) -> str:
    """Return the names of labels as text, the first ones if there are many."""
    more = f" and {len(names) - SHOWN_LABELS} more" if len(names) > SHOWN_LABELS else ""
    return ", ".join(names[:SHOWN_LABELS]) + more


def _labelled(sources: Iterable[Source]) -> Iterator[Labelled | LabelledImage]:
    for source in sources:
        reader = RowReader(source.format, source.columns, source.roles)
        rule = HeaderRule(source.header, source.columns.values(), COLUMNS)
        for row in islice(read_rows(source, rule), source.max_rows):
            if not isinstance(row, Row):
                continue
            try:
                example = reader.read(row)
            except DataError:  # reported with the rows that are tokenized
                continue
            if not isinstance(example, Labelled | LabelledImage):
                break
            yield example


def _sort_key(name: str) -> tuple[bool, float, str]:
    """Sort numbers before words and by their values."""
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name
