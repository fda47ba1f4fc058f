"""Bad rows, grouped by their problem."""

import re
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import TypedDict

from qlora.errors import without_secrets

# Placeholder for values that differ.
HIDDEN = "…"
# Maximum number of causes, of rows shown for each, and of characters shown of a row.
KEPT_CAUSES, SHOWN_EXAMPLES, SHOWN_CHARACTERS = 20, 3, 100
# Parts of messages that are specific to one row.
VALUES = re.compile(
    "|".join([
        r"(?<=, not )(?!with |shifted).*",  # should be text, not 3
        r"(?<=: )[\[{].*(?=;)",  # a turn has no role: {…}; map its keys
        r"(?<=turn's text, ).*(?=;)",  # the user turn's text, 'Hi'; set data.chat_template
        r"(?<=of )['\"].*['\"](?= is)",  # character 3 of 'Hi' is half a surrogate pair
        r"(?<!')\b\d[\d.]*\b",
    ]),
    re.DOTALL,
)  # fmt: skip


class Problem(TypedDict):
    """A cause of bad rows.

    Attributes:
        cause: What is wrong; values that differ between rows are replaced by ….
        count: Number of rows.
        examples: The first of them, each with its origin and content.
    """

    cause: str
    count: int
    examples: list[str]


@dataclass(slots=True)
class _Group:
    """Rows of one cause.

    Attributes:
        kind: Parts of their messages between the values.
        values: Values between the parts of `kind`, or None where rows differ.
        count: Number of rows.
        examples: Origin, message and excerpt of the first rows.
    """

    kind: tuple[str, ...]
    values: list[str | None]
    count: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def describe(self) -> Problem:
        """Return the cause with its examples: their own messages if these differ, else an excerpt of each row."""
        shown = [HIDDEN if value is None else value for value in self.values]
        return {
            "cause": "".join(chain(*zip_longest(self.kind, shown, fillvalue=""))),
            "count": self.count,
            "examples": [
                ": ".join(filter(None, (origin, text if None in self.values else excerpt)))
                for origin, text, excerpt in self.examples
            ],
        }


class ProblemLog:
    """Counts bad rows by cause; keeps a limited number of causes with a few rows each."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, ...], _Group] = {}

    def add(self, origin: str, problem: str, values: object = None) -> None:
        """Count a row.

        Args:
            origin: Its origin.
            problem: What is wrong, with or without the origin in front.
            values: Its values, or None if it can't be read.
        """
        text = problem.removeprefix(f"{origin}: ")
        kind = tuple(VALUES.split(text))
        if kind not in self._groups and len(self._groups) == KEPT_CAUSES:
            return
        found = VALUES.findall(text)
        group = self._groups.setdefault(kind, _Group(kind, list(found)))
        group.count += 1
        group.values = [one if one == other else None for one, other in zip(group.values, found, strict=True)]
        if len(group.examples) < SHOWN_EXAMPLES:
            excerpt = "" if values is None else without_secrets(f"{values!r:.{SHOWN_CHARACTERS}}")
            group.examples.append((origin, text, excerpt))

    def problems(self) -> list[Problem]:
        """Return the causes, the most frequent first."""
        return [group.describe() for group in sorted(self._groups.values(), key=lambda group: -group.count)]


def problem_lines(problems: list[Problem]) -> list[str]:
    """Return a line for each cause, and one for each of its examples."""
    lines = []
    for problem in problems:
        count = problem["count"]
        lines.append(f"{counted(count, 'row')}: {problem['cause']}")
        lines += [f"  {example}" for example in problem["examples"]]
    return lines


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, as `1 row` or `3 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
