"""Bad rows, grouped by what is wrong with them."""

import re
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import TypedDict

from qlora.errors import without_secrets

# Shown in place of values that differ.
HIDDEN = "…"
# Causes that are kept, rows shown of each, and characters shown of a row.
KEPT_CAUSES, SHOWN_EXAMPLES, SHOWN_CHARACTERS = 20, 3, 100
# What messages say of one row rather than of its kind.
VALUES = re.compile(
    "|".join([
        r"(?<=, not )(?!with |shifted).*",  # should be text, not 3
        r"(?<=: )[\[{].*(?=;)",  # a turn has no role: {…}; map its keys
        r"(?<=says, ).*(?=;)",  # what a turn says, 'Hi'; set data.chat_template
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
        examples: The first of them: where each is, and what it holds.
    """

    cause: str
    count: int
    examples: list[str]


@dataclass(slots=True)
class _Group:
    """Rows of one cause.

    Attributes:
        kind: What their texts say around their values.
        values: Between the parts of `kind`, the value that all rows share, or None where they differ.
        count: Number of rows.
        examples: Origin, text and excerpt of the first rows.
    """

    kind: tuple[str, ...]
    values: list[str | None]
    count: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def describe(self) -> Problem:
        """Return the cause with its examples: their own texts where these differ, else what each row holds."""
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
    """Counts bad rows by cause; holds a few causes with a few rows each, however many there are."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, ...], _Group] = {}

    def add(self, origin: str, problem: str, values: object = None) -> None:
        """Count a row.

        Args:
            origin: Where it is.
            problem: What is wrong; the origin in front is left out.
            values: What the row holds, or None if it can't be read.
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
        """The causes, the most frequent first."""
        return [group.describe() for group in sorted(self._groups.values(), key=lambda group: -group.count)]


def problem_lines(problems: list[Problem]) -> list[str]:
    """A line for each cause, and one for each of its examples."""
    lines = []
    for problem in problems:
        count = problem["count"]
        lines.append(f"{counted(count, 'row')}: {problem['cause']}")
        lines += [f"  {example}" for example in problem["examples"]]
    return lines


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, as `1 row` or `3 rows`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
