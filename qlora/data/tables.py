"""Rows of CSV and TSV files, with or without a header line."""

import csv
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from qlora.data.problems import counted
from qlora.errors import DataError


class HeaderRule:
    """Decides whether the tables of a source begin with a header line, and records why.

    With `auto`, the first line is a header if it has a column name that is read, and data if columns are mapped by
    number. If the first line matches both rules or neither, it is rejected: guessing would lose a row or train on a
    header.

    Args:
        header: `True`, `False` or `auto`.
        mapped: Column names that the source's mapping reads.
        known: Column names that formats read.
    """

    def __init__(self, header: bool | str, mapped: Collection[str], known: Collection[str] = ()) -> None:
        self._header, self._mapped, self._known = header, set(mapped), set(known)
        self._decisions: Counter[str] = Counter()

    def is_header(self, fields: list[str], origin: str) -> bool:
        """Decide for the table whose first line has these fields.

        Raises:
            DataError: The rule is `auto`, and the line is ambiguous.
        """
        if isinstance(self._header, bool):
            return self._header
        names = [name for name in fields if name in self._known | self._mapped]
        numbers = sorted(name for name in self._mapped if name.isdecimal() and name not in names)
        if names and numbers:
            raise DataError(
                f"{origin}: the first line names {', '.join(names)}, but columns maps by number "
                f"({', '.join(numbers)}); set header: true or header: false for this source."
            )
        if not names and not numbers:
            raise DataError(
                f"{origin}: the first line has no column name that is read, so it may be a header or a row: "
                f"{fields!r:.200}. For this source set header: true and map the names with columns, as {{instruction: "
                "question, output: answer}, or set header: false and map the columns by number, as {instruction: 0, "
                "output: 1}."
            )
        decision = (
            f"a header, because it names {', '.join(names)}" if names else "data, because columns are mapped by number"
        )
        self._decisions[f"header: auto: the first line is {decision}"] += 1
        return bool(names)

    def notes(self) -> list[str]:
        """A line for each decision, with the number of files if there are several."""
        several = self._decisions.total() > 1
        return [f"{text} ({counted(count, 'file')})" if several else text for text, count in self._decisions.items()]


def table_rows(
    lines: Iterable[str], path: Path, delimiter: str, rule: HeaderRule
) -> Iterator[tuple[int, dict[str, str], str]]:
    """Read a table row by row; without a header its columns are named `0`, `1`, ….

    Args:
        lines: Lines of the table, with their line ends.
        path: Path of the file, for messages.
        delimiter: Character between fields.
        rule: Rule for the first line.

    Yields:
        Number of the line on which the row begins, values by column, and what is wrong with it, or an empty text.

    Raises:
        DataError: The header is broken, or `rule` can't decide.
    """
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    named_by = "the header names"
    while True:
        number = reader.line_num + 1  # the row's first line: an unclosed quote runs to the end of the file
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if columns is None:
                raise DataError(f"{path}:{number}: broken CSV header: {error}.") from None
            yield number, {}, f"broken CSV: {error}."
            continue
        if not fields:
            continue
        if columns is None:
            if rule.is_header(fields, f"{path}:{number}"):
                columns = fields
                if len(set(columns)) < len(columns):
                    raise DataError(f"{path}:{number}: the header names a column twice: {', '.join(columns)}.")
                continue
            columns, named_by = [str(place) for place in range(len(fields))], "the first row has"
        if len(fields) != len(columns):
            until = f" (up to line {reader.line_num})" if "\n" in "".join(fields) else ""
            yield number, {}, f"{len(fields)} fields{until}, but {named_by} {len(columns)}."
        else:
            yield number, dict(zip(columns, fields, strict=True)), ""
