"""One source, tokenized once and cached, with a report on its rows."""

import hashlib
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qlora.data.cache import find_entry, new_entry, write_report
from qlora.data.cache_key import key_of, stamps_of
from qlora.data.encode import Encoded, ExampleEncoder
from qlora.data.examples import Conversation, Example, Labelled, LabelledImage, Preference, Rated
from qlora.data.formats import COLUMNS, RowReader
from qlora.data.images import ImageEncoder
from qlora.data.mismatched import MismatchedAnswers
from qlora.data.options import EncodeOptions
from qlora.data.problems import ProblemLog, counted
from qlora.data.report import DataReport
from qlora.data.rows import BadRow, Row, read_rows
from qlora.data.sources import FoundFiles, Source, file_notes, find_files
from qlora.data.store import ExampleStore, ExampleWriter
from qlora.data.tables import HeaderRule
from qlora.data.tokens import TokenizedExample
from qlora.errors import DataError

# Characters that are tokenized at a time. Two such batches are in memory at once.
BATCH_CHARACTERS = 1 << 19
# Bytes of an image in a row that count as one character.
BYTES_PER_CHARACTER = 32
# Examples that are never split, by what messages call them.
WHOLE = {Preference | Rated: "rated answers", Labelled: "a text with a label"}
WHOLE_FORMATS = ("preference", "kto", "classification")
Encoder = ExampleEncoder | ImageEncoder


def prepare(source: Source, encoder: Encoder, options: EncodeOptions, cache: Path) -> tuple[ExampleStore, DataReport]:
    """Return the tokenized examples of a source from the cache, tokenizing them first if they aren't there.

    Raises:
        DataError: The source can't be read, rows can't be used, or no example is left to train on.
    """
    files = find_files(source)
    stamps = stamps_of(files)
    key = key_of(source, files, encoder.identity(), options)
    found = find_entry(cache, key)
    if found is None:
        with new_entry(cache, key) as folder:
            _Build(source, files, encoder, options, folder).run()
            if stamps_of(find_files(source)) != stamps:  # the key would describe the previous content of the files
                raise DataError(f"{source.path} changed while it was read; start again once it is complete.")
        found = find_entry(cache, key)
    if found is None:
        raise DataError(f"{cache / key} was written but can't be read back; set data.cache_dir to another folder.")
    report = DataReport(**found)
    if report.bad_rows and options.on_bad_row == "error":
        raise DataError(f"{report.describe_problems()}\nTo drop such rows, set data.on_bad_row: drop.")
    return ExampleStore(cache / key), report


@dataclass(frozen=True, slots=True)
class _PendingRows:
    """A batch of rows that is being tokenized.

    Attributes:
        rows: The rows as they were read.
        examples: For each row its example, or why it has none.
        encodings: The pending examples.
    """

    rows: list[Row | BadRow]
    examples: list[Example | str]
    encodings: Any


class _Build:
    """Reads and tokenizes one source into a folder, a batch of rows at a time."""

    def __init__(
        self, source: Source, files: FoundFiles, encoder: Encoder, options: EncodeOptions, folder: Path
    ) -> None:
        self.source, self.files, self.encoder, self.options, self.folder = source, files, encoder, options, folder
        self.report = DataReport(source.path)
        self._problems = ProblemLog()
        self._mismatched = MismatchedAnswers(options.max_seq_len)
        # One entry per row and per document, so 8 bytes each.
        self._hashes, self._lengths = array("Q"), array("q")

    def run(self) -> None:
        """Write examples and report, leaving out rows that can't be used.

        Raises:
            DataError: The source can't be read, or no row is left.
        """
        started = time.perf_counter()
        report = self.report
        source = self.source
        reader = RowReader(source.format, source.columns, source.roles)
        rule = HeaderRule(source.header, source.columns.values(), COLUMNS)
        writer: ExampleWriter | None = None
        try:
            pending: _PendingRows | None = None
            for rows in _batches(islice(read_rows(source, rule, self.files), source.max_rows), self.encoder.batch_rows):
                # A batch is tokenized while the next one is read and rendered.
                begun = self._begin(rows, reader)
                if writer is None:  # now the format is known
                    writer = ExampleWriter(self.folder, self.encoder.columns(reader.format))
                if pending is not None:
                    self._finish(pending, writer)
                pending = begun
            if pending is not None and writer is not None:
                self._finish(pending, writer)
            self._mismatched.close()
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise
        report.digest = "" if writer is None else writer.close()
        report.format = reader.format
        report.problems = self._problems.problems()
        if not report.examples:
            raise DataError(self._describe_nothing())
        report.duplicates = len(self._hashes) - len(np.unique(np.asarray(self._hashes)))
        report.measure(np.asarray(self._lengths), self.options.max_seq_len)
        report.unread_columns, report.unread_keys = sorted(reader.unread), sorted(reader.unread_keys)
        report.notes = [
            *sorted(reader.notes),
            *self.encoder.notes(report.format),
            *file_notes(source, self.files),
            *rule.notes(),
        ]
        if report.rows == source.max_rows:
            report.notes.append(f"max_rows: at most {report.rows} rows were read")
        report.seconds = time.perf_counter() - started
        write_report(self.folder, report.as_dict())

    def _begin(self, rows: list[Row | BadRow], reader: RowReader) -> _PendingRows:
        """Read a batch of rows and start tokenizing it."""
        if reader.format == "auto":
            reader.detect(row for row in rows if isinstance(row, Row))
        examples: list[Example | str] = []
        for row in rows:
            try:
                examples.append(row.problem if isinstance(row, BadRow) else reader.read(row))
            except DataError as error:
                examples.append(str(error))
        pending = self.encoder.begin([example for example in examples if not isinstance(example, str)])
        return _PendingRows(rows, examples, pending)

    def _finish(self, batch: _PendingRows, writer: ExampleWriter) -> None:
        """Write the examples of a pending batch."""
        encoded = iter(self.encoder.finish(batch.encodings))
        for row, example in zip(batch.rows, batch.examples, strict=True):
            number = self.report.rows
            self.report.rows += 1
            result = example if isinstance(example, str) else next(encoded)
            if isinstance(example, str) or isinstance(result, str | DataError):
                self._refuse(row, str(result))
            elif not all(map(len, result.documents)):
                self._refuse(row, "it has no tokens.")
            elif not isinstance(example, Labelled | LabelledImage) and not any(map(_is_supervised, result.groups)):
                self._refuse(row, "no token of this row is supervised; it needs an answer that is trained on.")
            else:
                self._write(number, row, example, result, writer)

    def _write(self, number: int, row: Row | BadRow, example: Example, result: Encoded, writer: ExampleWriter) -> None:
        report, options = self.report, self.options
        longest = max(map(len, result.documents))
        whole = next((what for kind, what in WHOLE.items() if isinstance(example, kind)), None)
        if longest > options.max_seq_len and (options.overlong == "error" or options.overlong == "split" and whole):
            what = f"{longest} tokens, more than data.max_seq_len ({options.max_seq_len}); raise it, or set "
            choices = f"drop or truncate, as {whole} can't be split" if whole else "drop, truncate or split"
            self._refuse(row, f"{what}data.overlong to {choices}.")
            return
        is_shortened = longest > options.max_seq_len and options.overlong == "truncate"
        if is_shortened and isinstance(example, Labelled) and isinstance(self.encoder, ExampleEncoder):
            shorter = self.encoder.shorten(example, options.max_seq_len)
            if isinstance(shorter, DataError):
                self._refuse(row, str(shorter))
                return
            result = shorter
            report.overlong["truncated"] = report.overlong.get("truncated", 0) + 1
        report.per_answer += result.per_answer
        report.eos_added += result.eos_added
        for counts, more in (report.switched, result.switched), (report.control_tokens, result.control_tokens):
            counts.update({name: counts.get(name, 0) + count for name, count in more.items()})
        report.empty_answers += isinstance(example, Conversation) and _has_empty_answer(example)
        content = b"".join(document.content for document in result.documents)
        self._hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
        for group in result.groups:
            self._lengths.extend(map(len, group))
            for part in _fit(group, options, report.overlong):
                if isinstance(example, Rated):
                    for row_number, pair in self._mismatched.add(number, *part):
                        self._append(row_number, pair, writer, num_compared=1)
                else:
                    self._append(number, part, writer)

    def _append(
        self, row: int, group: Sequence[TokenizedExample], writer: ExampleWriter, num_compared: int | None = None
    ) -> None:
        writer.append(group, row, num_compared=num_compared)
        self.report.examples += len(group)
        self.report.tokens += sum(map(len, group))
        self.report.supervised_tokens += sum(document.num_supervised for document in group)

    def _refuse(self, row: Row | BadRow, problem: str) -> None:
        self.report.bad_rows += 1
        self._problems.add(row.origin, problem, row.values if isinstance(row, Row) else None)

    def _describe_nothing(self) -> str:
        report = self.report
        lines = [f"{report.source}: {counted(report.rows, 'row')}, but no example is left to train on."]
        if report.overlong:
            choices = ["truncate"] if report.format in WHOLE_FORMATS else ["truncate", "split"]
            others = " or ".join(each for each in choices if each != self.options.overlong)
            lines.append(
                f"{sum(report.overlong.values())} were too long: data.max_seq_len is {self.options.max_seq_len} and "
                f"data.overlong is {self.options.overlong}; raise max_seq_len"
                + (f", or set overlong to {others}." if others else ".")
            )
        if report.bad_rows:
            lines.append(report.describe_problems())
        return "\n".join(lines)


def _batches(rows: Iterable[Row | BadRow], num_rows: int) -> Iterator[list[Row | BadRow]]:
    """Split rows into batches of at most `num_rows`, with just enough text to tokenize efficiently."""
    batch: list[Row | BadRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _characters(row.values) if isinstance(row, Row) else 0
        if size >= BATCH_CHARACTERS or len(batch) >= num_rows:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, bytes):
        return len(value) // BYTES_PER_CHARACTER
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1


def _fit(
    group: Sequence[TokenizedExample], options: EncodeOptions, counts: dict[str, int]
) -> Iterator[Sequence[TokenizedExample]]:
    """Yield a group if it fits `max_seq_len`, else what `overlong` leaves of it; add to the counts of documents."""
    limit, overlong = options.max_seq_len, options.overlong
    if max(map(len, group)) <= limit:
        yield group
        return
    starts = {"drop": [], "truncate": [0], "split": range(0, max(map(len, group)), limit)}[overlong]
    parts = [[document[start : start + limit] for document in group] for start in starts]
    kept = [part for part in parts if _is_supervised(part)]
    outcome = {"truncate": "truncated", "split": "split"}[overlong] if kept else "dropped"
    counts[outcome] = counts.get(outcome, 0) + len(group)
    yield from kept


def _is_supervised(group: Sequence[TokenizedExample]) -> bool:
    """Return whether every document of a group has a supervised token."""
    return all(document.num_supervised for document in group)


def _has_empty_answer(example: Conversation) -> bool:
    return any(
        turn["role"] == "assistant" and not turn["content"].strip() and "tool_calls" not in turn
        for turn in example.messages
    )
