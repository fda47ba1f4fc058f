"""Statistics on the rows of a source."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qlora.data.problems import Problem, counted, problem_lines

QUANTILES = {"shortest": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "longest": 1.0}


@dataclass(slots=True)
class DataReport:
    """Statistics on the rows of one source.

    Attributes:
        source: Path of the source.
        format: Format of the rows.
        chat_template: Description of the chat template.
        rows: Number of rows read, including bad ones.
        bad_rows: Number of rows that can't be used and were dropped.
        problems: Problems of the bad rows, by cause.
        unread_columns: Columns that the format does not read.
        unread_keys: Keys of turns and of their parts that are not read.
        duplicates: Number of rows with the same tokens as an earlier row of the source.
        examples: Number of documents.
        deduplicated: Number of these that were removed because they repeat an earlier or a held-out one of the run.
        drawn: Number of documents that an epoch sees, after deduplication, holding out and the source's weight; for an
            evaluation source, the number that the evaluation sees.
        tokens: Number of tokens.
        supervised_tokens: Number of tokens included in the loss.
        per_answer: Number of conversations with a document per answer, as their template changes earlier turns.
        eos_added: Number of conversations that the tokenizer's EOS was added to, as their template ends no answer.
        empty_answers: Number of conversations with an answer without text.
        switched: Number of answers after a prompt with thinking switched on or off, by the setting a server needs.
        control_tokens: Number of control tokens in the text of turns, by token.
        overlong: Number of documents dropped, truncated or split because they, or others of their group, were too
            long.
        lengths: Quantiles of the documents' lengths in tokens, before any was truncated or dropped.
        histogram: Histogram of these lengths: the longest length and the number of documents of each bin.
        notes: Anything else a user should know.
        seconds: Time that reading and tokenizing took, in seconds.
        digest: Digest of all ids and weights: equal for equal training data.
    """

    source: str
    format: str = ""
    chat_template: str = ""
    rows: int = 0
    bad_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    unread_columns: list[str] = field(default_factory=list)
    unread_keys: list[str] = field(default_factory=list)
    duplicates: int = 0
    examples: int = 0
    deduplicated: int = 0
    drawn: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    per_answer: int = 0
    eos_added: int = 0
    empty_answers: int = 0
    switched: dict[str, int] = field(default_factory=dict)
    control_tokens: dict[str, int] = field(default_factory=dict)
    overlong: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    histogram: list[list[int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    digest: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        return asdict(self)

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that is supervised."""
        return self.supervised_tokens / max(1, self.tokens)

    def measure(self, lengths: np.ndarray, max_seq_len: int) -> None:
        """Fill in quantiles and histogram of documents' lengths."""
        self.lengths = {name: int(np.quantile(lengths, share, method="nearest")) for name, share in QUANTILES.items()}
        self.histogram = histogram(lengths, max_seq_len)

    def bars(self) -> list[tuple[int, int, int, float]]:
        """Return first and last length of each bin, its number of documents, and that as a share of the fullest bin."""
        starts = [1, *(high + 1 for high, _ in self.histogram)]
        fullest = max((count for _, count in self.histogram), default=1)
        return [(low, high, count, count / fullest) for low, (high, count) in zip(starts, self.histogram, strict=False)]

    def describe_problems(self) -> str:
        """Summarize the bad rows by cause."""
        head = f"{self.bad_rows} of {self.rows} rows of {self.source} can't be used:"
        return "\n".join([head, *self.problem_lines()])

    def problem_lines(self) -> list[str]:
        """Return lines on the causes of bad rows with examples, and on the number of rows with other causes."""
        others = self.bad_rows - sum(problem["count"] for problem in self.problems)
        return problem_lines(self.problems) + ([f"{counted(others, 'row')}: other causes"] if others else [])

    def remarks(self) -> list[str]:
        """Return a line for everything out of the ordinary."""
        counts = [
            (self.bad_rows, "bad row", "dropped"),
            (self.duplicates, "row", "equal to an earlier one"),
            (self.deduplicated, "example", "removed, equal to an earlier or a held-out one"),
            (self.per_answer, "conversation", "trained answer by answer, as the history that a server renders differs"),
            (self.eos_added, "conversation", "with EOS added, as the template writes no end token"),
            (self.empty_answers, "conversation", "with an empty answer"),
        ]
        counts += [(count, "document", f"{outcome} because of max_seq_len") for outcome, count in self.overlong.items()]
        counts += [
            (count, "answer", f"with {switch} in the prompt; set it on the server")
            for switch, count in self.switched.items()
        ]
        lines = [f"{counted(count, noun)} {rest}" for count, noun, rest in counts if count]
        if self.control_tokens:
            found = ", ".join(f"{token} {count}" for token, count in sorted(self.control_tokens.items()))
            total = counted(sum(self.control_tokens.values()), "control token")
            lines.append(
                f"{total} in the text of turns, tokenized as such: {found}; an end token in an answer is not supervised"
            )
        unread = {"columns": self.unread_columns, "keys of turns": self.unread_keys}
        lines += [f"{what} not read: {', '.join(names)}" for what, names in unread.items() if names]
        return lines + self.notes

    def summary(self) -> str:
        """Return one line, and another for each remark."""
        drawn = f", {self.drawn:,} of them an epoch" if self.drawn != self.examples else ""
        head = (
            f"{self.source}: {counted(self.rows, 'row')} as {self.format}, {counted(self.examples, 'example')}{drawn}"
        )
        if self.format != "images":
            head += (
                f", {self.tokens:,} tokens, {self.supervised_share:.0%} supervised; chat template: {self.chat_template}"
            )
        return "\n".join([head, *(f"  {remark}" for remark in self.remarks())])


def histogram(lengths: np.ndarray, max_seq_len: int) -> list[list[int]]:
    """Count lengths in bins of doubling width, one of which ends at `max_seq_len`.

    Returns:
        The longest length and the count of each bin, without empty bins at both ends.
    """
    longest = int(np.max(lengths, initial=0))
    edges = [8]
    while edges[-1] < longest:
        edges.append(edges[-1] * 2)
    edges = sorted({*edges, max_seq_len} if longest > max_seq_len else {*edges})
    places = np.searchsorted(edges, lengths)
    counts = np.bincount(places, minlength=len(edges))[: len(edges)]
    filled = np.flatnonzero(counts)
    return [[edges[bin_], int(counts[bin_])] for bin_ in range(filled[0], filled[-1] + 1)] if len(filled) else []
