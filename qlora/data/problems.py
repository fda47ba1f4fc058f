"""Bad rows, grouped by what is wrong with them."""

import re
from dataclasses import dataclass, field
from typing import TypedDict

from qlora.errors import without_secrets

# Causes that are kept, rows shown of each, and characters shown of a row.
KEPT_CAUSES, SHOWN_EXAMPLES, SHOWN_CHARACTERS = 20, 3, 100
# What messages say of one row rather than of its kind: values after "not", a colon, "says" or "of", and numbers.
VALUES = re.compile(
    r"(?<=, not )(?!with |shifted).*|(?<=: )[\[{].*(?=;)|(?<=says, ).*(?=;)|(?<=of )['\"].*['\"](?= )|(?<!')\b\d[\d.]*\b",
    re.DOTALL,
)


class Problem(TypedDict):
    """A cause of bad rows.

    Attributes:
        cause: What is wrong, with … for what differs between its rows.
        count: Number of rows.
        examples: The first of them: where each is, and what it holds.
    """

    cause: str
    count: int
    examples: list[str]


@dataclass(slots=True)
class _Group:
    texts: set[str] = field(default_factory=set)
    count: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)


class ProblemLog:
    """Counts bad rows by cause; holds a few causes with a few rows each, however many there are."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def add(self, origin: str, problem: str, values: object = None) -> None:
        """Count a row.

        Args:
            origin: Where it is.
            problem: What is wrong; the origin in front is left out.
            values: What the row holds, or None if it can't be read.
        """
        problem = problem.removeprefix(f"{origin}: ")
        cause = VALUES.sub("…", problem)
        if cause not in self._groups and len(self._groups) == KEPT_CAUSES:
            return
        group = self._groups.setdefault(cause, _Group())
        group.count += 1
        if len(group.texts) < 2:
            group.texts.add(problem)
        if len(group.examples) < SHOWN_EXAMPLES:
            excerpt = "" if values is None else without_secrets(f"{values!r:.{SHOWN_CHARACTERS}}")
            group.examples.append((origin, problem, excerpt))

    def problems(self) -> list[Problem]:
        """The causes, the most frequent first."""
        groups = sorted(self._groups.items(), key=lambda item: -item[1].count)
        return [_describe(cause, group) for cause, group in groups]


def problem_lines(problems: list[Problem]) -> list[str]:
    """A line for each cause, and one for each of its examples."""
    lines = []
    for problem in problems:
        count = problem["count"]
        lines.append(f"{count} {'row' if count == 1 else 'rows'}: {problem['cause']}")
        lines += [f"  {example}" for example in problem["examples"]]
    return lines


def _describe(cause: str, group: _Group) -> Problem:
    """One text for all rows where they share it; else each example shows its own."""
    differ = len(group.texts) > 1
    shown = [
        ": ".join(filter(None, (origin, problem if differ else excerpt))) for origin, problem, excerpt in group.examples
    ]
    return {"cause": cause if differ else next(iter(group.texts)), "count": group.count, "examples": shown}
