"""What became of the rows of a source, in numbers."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qlora.data.problems import Problem, counted, problem_lines

QUANTILES = {"shortest": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "longest": 1.0}


@dataclass(slots=True)
class DataReport:
    """What became of the rows of one source.

    Attributes:
        format: As which the rows were read.
        rows: That were read, bad ones among them.
        bad_rows: That can't be used, and were left out.
        problems: What is wrong with them, by cause.
        unread_columns: That the format does not read.
        unread_keys: Keys of turns and of their parts that are not read.
        duplicates: Rows that an earlier one says already, token for token.
        examples: Documents to learn from.
        deduplicated: Of those, how many are left out as they repeat an earlier or a held-out one of the run.
        drawn: Of those, how many an epoch sees, by the source's weight and without those held out or left out; of a
            source to evaluate on, how many it is evaluated on.
        per_answer: Conversations that became a document per answer, as their template rewrites earlier turns.
        eos_added: Conversations that got the tokenizer's EOS, as their template ends no answer.
        empty_answers: Conversations with an answer of no text.
        switched: Answers behind a prompt with thinking switched on or off, by the switch that a server needs.
        control_tokens: Control tokens in the text of turns, and how often each occurs.
        overlong: What was done with examples that were too long, and how often.
        lengths: Quantiles of the documents' lengths in tokens, before any was cut or left out.
        histogram: Of these lengths: the longest of each bin, and how many documents it has.
        notes: What else a user should know.
        seconds: That reading and tokenizing took, when it was done.
        digest: Of all ids and weights: equal when the same is learned from.
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
        """For JSON."""
        return asdict(self)

    @property
    def supervised_share(self) -> float:
        """Of all tokens, those that are learned."""
        return self.supervised_tokens / max(1, self.tokens)

    def measure(self, lengths: np.ndarray, max_seq_len: int) -> None:
        """Fills in quantiles and histogram of documents' lengths."""
        self.lengths = {name: int(np.quantile(lengths, share, method="nearest")) for name, share in QUANTILES.items()}
        self.histogram = histogram(lengths, max_seq_len)

    def bars(self) -> list[tuple[int, int, int, float]]:
        """The histogram to draw: first and last length of each bin, its documents, and its share of the fullest bin."""
        starts = [1, *(high + 1 for high, _ in self.histogram)]
        fullest = max((count for _, count in self.histogram), default=1)
        return [(low, high, count, count / fullest) for low, (high, count) in zip(starts, self.histogram, strict=False)]

    def describe_problems(self) -> str:
        """Summarize the bad rows by cause."""
        head = f"{self.bad_rows} of {self.rows} rows of {self.source} can't be used:"
        return "\n".join([head, *self.problem_lines()])

    def problem_lines(self) -> list[str]:
        """The causes of bad rows with examples, and how many rows have other causes."""
        others = self.bad_rows - sum(problem["count"] for problem in self.problems)
        return problem_lines(self.problems) + ([f"{counted(others, 'row')}: other causes"] if others else [])

    def remarks(self) -> list[str]:
        """Everything that is not as in a plain case, a line each."""
        counts = {
            "bad rows left out": self.bad_rows,
            "rows that repeat an earlier one": self.duplicates,
            "examples left out, as they repeat an earlier or a held-out one": self.deduplicated,
            "conversations trained answer by answer, as a server would show each another history": self.per_answer,
            "conversations got EOS added, as the template ends no answer": self.eos_added,
            "conversations with an empty answer": self.empty_answers,
        }
        counts |= {f"documents longer than max_seq_len {fate}": count for fate, count in self.overlong.items()}
        counts |= {
            f"answers that need {switch} in the prompt; set it on the server": count
            for switch, count in self.switched.items()
        }
        lines = [f"{count} {what}" for what, count in counts.items() if count]
        if self.control_tokens:
            found = ", ".join(f"{token} {count}" for token, count in sorted(self.control_tokens.items()))
            total = counted(sum(self.control_tokens.values()), "control token")
            lines.append(
                f"{total} in the text of turns, tokenized as such: {found}; an end token inside an answer is not "
                "learned"
            )
        unread = {"columns": self.unread_columns, "keys of turns": self.unread_keys}
        lines += [f"{what} not read: {', '.join(names)}" for what, names in unread.items() if names]
        return lines + self.notes

    def summary(self) -> str:
        """One line for people, and one more for each remark."""
        drawn = f", {self.drawn} of them an epoch" if self.drawn != self.examples else ""
        head = (
            f"{self.source}: {self.rows} rows as {self.format}, {self.examples} examples{drawn}, {self.tokens} tokens, "
            f"{self.supervised_share:.0%} supervised; chat template: {self.chat_template}"
        )
        return "\n".join([head, *(f"  {remark}" for remark in self.remarks())])


def histogram(lengths: np.ndarray, max_seq_len: int) -> list[list[int]]:
    """Counts lengths in bins that double, one of which ends at `max_seq_len`.

    Returns:
        The longest length of each bin, and how many are in it and in none before; empty bins at the ends left out.
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
