"""One source, tokenized once and then kept, with a report on every row."""

import hashlib
import json
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qlora.data.encode import Begun, Encoded, ExampleEncoder
from qlora.data.examples import Conversation, Example, Labelled
from qlora.data.formats import COLUMNS, RowReader
from qlora.data.problems import ProblemLog
from qlora.data.report import DataReport
from qlora.data.rows import BadRow, Row, load_hub, read_rows
from qlora.data.serving import tokenizer_notes
from qlora.data.sources import Source, file_notes, find_files
from qlora.data.store import ExampleStore, ExampleWriter, find_entry, new_entry
from qlora.data.tables import HeaderRule
from qlora.data.tokens import TokenizedExample
from qlora.errors import DataError

# Rows tokenized together: as many as hold so much text. Two such batches are in memory at a time.
BATCH_CHARACTERS, BATCH_ROWS = 1 << 19, 512


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is done with examples; with the tokenizer and the source, all that decides what is learned.

    Attributes:
        loss_on: See :class:`qlora.data.encode.ExampleEncoder`.
        max_seq_len: Tokens of the longest example.
        overlong: What becomes of longer ones: `drop`, `truncate`, `split` or `error`. Always counted.
        on_bad_row: `error`, or `drop`, which is counted.
    """

    loss_on: str = "assistant"
    max_seq_len: int = 2048
    overlong: str = "drop"
    on_bad_row: str = "error"


def prepare(
    source: Source, encoder: ExampleEncoder, treatment: Treatment, cache: Path
) -> tuple[ExampleStore, DataReport]:
    """The tokenized examples of a source: found, or made and kept.

    Raises:
        DataError: The source can't be read, rows are bad, or none is left to learn from.
    """
    stamps = _stamps(source)
    key = _key(source, encoder.tokenizer, treatment)
    about = find_entry(cache, key)
    if about is None:
        with new_entry(cache, key) as folder:
            _Build(source, encoder, treatment, folder).run()
            if _stamps(source) != stamps:  # the key would name what the files held before
                raise DataError(f"{source.path} was changed while it was read; start again when it is written.")
        about = find_entry(cache, key)
    if about is None:
        raise DataError(f"{cache / key} was written, but can't be read again; set data.cache_dir elsewhere.")
    report = DataReport(**about["report"])
    if report.bad_rows and treatment.on_bad_row == "error":
        raise DataError(f"{report.describe_problems()}\ndata.on_bad_row: drop leaves such rows out.")
    return ExampleStore(cache / key), report


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows on their way.

    Attributes:
        rows: As they were read.
        read: What each says, or why it says nothing.
        begun: Those that say something.
    """

    rows: list[Row | BadRow]
    read: list[Example | str]
    begun: Begun


class _Build:
    """Reads and tokenizes one source into a folder, a batch of rows at a time."""

    def __init__(self, source: Source, encoder: ExampleEncoder, treatment: Treatment, folder: Path) -> None:
        self.source, self.encoder, self.treatment, self.folder = source, encoder, treatment, folder
        self.report = DataReport(source.path)
        self._problems = ProblemLog()
        # Of every row and document, so in 8 bytes each.
        self._hashes, self._lengths = array("Q"), array("q")

    def run(self) -> None:
        """Writes examples and report, bad rows left out.

        Raises:
            DataError: The source can't be read, or no row is left.
        """
        started = time.perf_counter()
        report = self.report
        source = self.source
        reader = RowReader(source.format, source.columns, source.roles)
        rule = HeaderRule(source.header, source.columns.values(), COLUMNS)
        writer = ExampleWriter(self.folder)
        try:
            under_way: _Batch | None = None
            for rows in _batches(islice(read_rows(source, rule), source.max_rows)):
                # One batch is tokenized while the next is read and rendered.
                begun = self._begin(rows, reader)
                if under_way is not None:
                    self._finish(under_way, writer)
                under_way = begun
            if under_way is not None:
                self._finish(under_way, writer)
        except BaseException:
            writer.abandon()
            raise
        about = writer.close()
        report.format = reader.format
        report.problems = self._problems.problems()
        if not report.examples:
            raise DataError(self._describe_nothing())
        report.duplicates = len(self._hashes) - len(np.unique(np.asarray(self._hashes)))
        report.measure(np.asarray(self._lengths), self.treatment.max_seq_len)
        report.unread_columns, report.unread_keys = sorted(reader.unread), sorted(reader.unread_keys)
        report.notes = [*sorted(reader.notes), *tokenizer_notes(self.encoder.tokenizer), *file_notes(source)]
        report.notes += rule.notes()
        if report.rows == source.max_rows:
            report.notes.append(f"max_rows: at most {report.rows} rows were read")
        if report.format in ("alpaca", "sharegpt", "messages", "oasst", "preference", "chosen", "kto"):
            report.notes += self.encoder.facts.notes()
        report.digest = about["digest"]
        report.seconds = time.perf_counter() - started
        (self.folder / "about.json").write_text(json.dumps(about | {"report": report.as_dict()}), encoding="utf-8")

    def _begin(self, rows: list[Row | BadRow], reader: RowReader) -> _Batch:
        """Reads a batch of rows and has it tokenized."""
        if reader.format == "auto":
            reader.detect(row for row in rows if isinstance(row, Row))
        read: list[Example | str] = []
        for row in rows:
            try:
                read.append(row.problem if isinstance(row, BadRow) else reader.read(row))
            except DataError as error:
                read.append(str(error))
        return _Batch(rows, read, self.encoder.begin([example for example in read if not isinstance(example, str)]))

    def _finish(self, batch: _Batch, writer: ExampleWriter) -> None:
        """Writes the examples of a batch that was begun."""
        encoded = iter(self.encoder.finish(batch.begun))
        for row, example in zip(batch.rows, batch.read, strict=True):
            number = self.report.rows
            self.report.rows += 1
            result = example if isinstance(example, str) else next(encoded)
            if isinstance(example, str) or isinstance(result, str | DataError):
                self._refuse(row, str(result))
            elif not all(map(len, result.documents)):
                self._refuse(row, "it has no tokens.")
            elif not isinstance(example, Labelled) and not any(part.num_supervised for part in result.documents):
                self._refuse(row, "no token of this row is supervised; it needs an answer that is learned.")
            else:
                self._write(number, row, example, result, writer)

    def _write(self, number: int, row: Row | BadRow, example: Example, result: Encoded, writer: ExampleWriter) -> None:
        report, treatment = self.report, self.treatment
        if treatment.overlong == "error":
            longest = max(map(len, result.documents))
            if longest > treatment.max_seq_len:
                what = f"{longest} tokens, more than data.max_seq_len ({treatment.max_seq_len}); raise it, or set "
                self._refuse(row, what + "data.overlong to drop, truncate or split.")
                return
        report.per_answer += result.per_answer
        report.eos_added += result.eos_added
        for counts, more in (report.switched, result.switched), (report.control_tokens, result.control_tokens):
            counts.update({name: counts.get(name, 0) + count for name, count in more.items()})
        report.empty_answers += isinstance(example, Conversation) and _has_empty_answer(example)
        content = b"".join(document.input_ids.tobytes() for document in result.documents)
        self._hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
        for document in result.documents:
            self._lengths.append(len(document))
            for part in _fit(document, treatment, report.overlong):
                writer.append(part, number)
                report.examples += 1
                report.tokens += len(part)
                report.supervised_tokens += part.num_supervised

    def _refuse(self, row: Row | BadRow, problem: str) -> None:
        self.report.bad_rows += 1
        self._problems.add(row.origin, problem, row.values if isinstance(row, Row) else None)

    def _describe_nothing(self) -> str:
        report = self.report
        lines = [f"{report.source}: of {report.rows} rows no example is left to learn from."]
        if report.overlong:
            lines.append(
                f"{sum(report.overlong.values())} were too long: data.max_seq_len is {self.treatment.max_seq_len}, "
                f"data.overlong {self.treatment.overlong}; raise the one, or set the other to truncate or split."
            )
        if report.bad_rows:
            lines.append(report.describe_problems())
        return "\n".join(lines)


def _batches(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    """Rows in groups that hold so much text that tokenizing them together pays, and no more."""
    batch: list[Row | BadRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _characters(row.values) if isinstance(row, Row) else 0
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1


def _fit(example: TokenizedExample, treatment: Treatment, counts: dict[str, int]) -> Iterator[TokenizedExample]:
    """The parts of an example that are trained on, none longer than allowed; counts what was done."""
    limit, overlong = treatment.max_seq_len, treatment.overlong
    if len(example) <= limit:
        yield example
        return
    starts = {"drop": [], "truncate": [0], "split": range(0, len(example), limit)}[overlong]
    parts = [example[start : start + limit] for start in starts]
    kept = [part for part in parts if part.num_supervised]
    fate = {"truncate": "truncated", "split": "split"}[overlong] if kept else "dropped"
    counts[fate] = counts.get(fate, 0) + 1
    yield from kept


def _has_empty_answer(example: Conversation) -> bool:
    return any(
        turn["role"] == "assistant" and not turn["content"].strip() and "tool_calls" not in turn
        for turn in example.messages
    )


def _key(source: Source, tokenizer: Any, treatment: Treatment) -> str:
    """A name for all that decides what a source's tokenized examples are."""
    paths = find_files(source)
    if paths and source.max_rows is None:
        content: Any = [(str(path.absolute()), _hash_file(path)) for path in paths]
    elif paths:  # hashing a large file may take far longer than reading its first rows
        abouts = [(path.absolute(), path.stat()) for path in paths]
        content = [(str(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns) for path, about in abouts]
    else:
        content = [(file["filename"], Path(file["filename"]).stat().st_size) for file in load_hub(source).cache_files]
    about = [
        _hash_of_code(),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        asdict(replace(treatment, on_bad_row="drop")),
        asdict(replace(source, weight=1.0)),
        content,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _stamps(source: Source) -> list[tuple[int, int]]:
    """Size and time of change of each file of a source."""
    return [(about.st_size, about.st_mtime_ns) for about in (path.stat() for path in find_files(source))]


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from None


@cache
def _hash_of_code() -> str:
    """Of what reads, renders and tokenizes: a change there may change what comes of it."""
    digest = hashlib.sha256()
    for file in sorted(files("qlora.data").iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    for package in ("transformers", "tokenizers", "datasets"):
        digest.update(version(package).encode())
    return digest.hexdigest()
