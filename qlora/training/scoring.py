"""Scores of the answers that a model gives to held-out rows."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.config import DataSection, EvalSection, metric_name
from qlora.data import Datasets, ExampleSet, Question, read_questions
from qlora.errors import ConfigError
from qlora.layers.placement import uneven_passes
from qlora.model import answer_all
from qlora.model.answer_metrics import METRICS, Metric, load_metric
from qlora.processes import Processes


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a model's answers.

    Attributes:
        by_set: Value of each metric by its name, by the name of the set.
        answered: Number of rows that were answered.
        seconds: Time that this took.
    """

    by_set: dict[str, dict[str, float]] = field(default_factory=dict)
    answered: int = 0
    seconds: float = 0.0

    def describe(self) -> str:
        """Return what it cost."""
        return f"answered {self.answered:,} rows in {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class Scorer:
    """The questions that a model is asked at every evaluation, and the metrics of its answers.

    Attributes:
        questions: Questions of each set that has any, by its name.
        metrics: Metrics by name.
        max_new_tokens: Largest number of tokens in an answer.
        max_tokens: Largest number of tokens in a batch.
        notes: Which rows are not asked, and why.
    """

    questions: Mapping[str, list[Question]] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    max_new_tokens: int = 1
    max_tokens: int = 1
    notes: Sequence[str] = ()

    @classmethod
    def from_section(
        cls,
        section: EvalSection,
        data: DataSection,
        tokenizer: Any,
        datasets: Datasets,
        sets: Mapping[str, ExampleSet],
        batch_size: int,
    ) -> "Scorer":
        """Read the questions of sets; without metrics there are none.

        Args:
            section: Section of the config.
            data: Data section of the config.
            tokenizer: Tokenizer with the chat template set.
            datasets: The data.
            sets: The sets to evaluate on, by name.
            batch_size: Number of sequences of `data.max_seq_len` that fit into memory; a batch has as many tokens.

        Raises:
            ConfigError: A metric can't be loaded, or no row of a set has an answer to compare with.
        """
        if not section.metrics or not sets:
            return cls()
        metrics = {metric_name(each): load_metric(each) for each in section.metrics}
        questions, notes = questions_of_sets(section, data, tokenizer, datasets, sets)
        return cls(questions, metrics, section.max_new_tokens, batch_size * data.max_seq_len, notes)

    @property
    def names(self) -> list[str]:
        """Names of all metrics in metrics.jsonl."""
        return [f"{name}_{metric}" for name in self.questions for metric in self.metrics]

    @property
    def unknown_names(self) -> list[str]:
        """Those of the names whose metrics are functions of the user, so that nothing is known of their values."""
        return [f"{name}_{metric}" for name in self.questions for metric in self.metrics if metric not in METRICS]

    def score(self, model: Any, tokenizer: Any, processes: Processes | None = None) -> Scores:
        """Answer all questions, each process a part of them, and compute the metrics.

        Args:
            model: A causal language model; its mode is restored afterwards.
            tokenizer: Its tokenizer.
            processes: Processes that share the questions; None for this one alone.

        Raises:
            ConfigError: A user's metric failed: on every process.
        """
        if not self.questions:
            return Scores()
        processes = Processes() if processes is None else processes
        started = time.perf_counter()
        rank, count = processes.rank, processes.world_size
        asked = [(name, each) for name, questions in self.questions.items() for each in questions]
        own = [question.prompt for _, question in asked[rank::count]]
        with uneven_passes(model):  # answers differ in length
            own_answers = answer_all(model, tokenizer, own, self.max_new_tokens, self.max_tokens)
        answers = processes.gather(own_answers)
        by_set: dict[str, dict[str, float]] = {}
        with processes.raise_together():
            if processes.is_first:
                pairs: dict[str, list[tuple[str, str]]] = {}
                for number, (name, question) in enumerate(asked):
                    pairs.setdefault(name, []).append((answers[number % count][number // count], question.reference))
                by_set = {
                    name: {metric: compute(*zip(*each, strict=True)) for metric, compute in self.metrics.items()}
                    for name, each in pairs.items()
                }
        return Scores(processes.broadcast(by_set), len(asked), time.perf_counter() - started)


def questions_of_sets(
    section: EvalSection, data: DataSection, tokenizer: Any, datasets: Datasets, sets: Mapping[str, ExampleSet]
) -> tuple[dict[str, list[Question]], list[str]]:
    """Read the questions of each set that has any; see :meth:`Scorer.from_section`.

    Returns:
        The questions by set, and a line for each set of which rows are left out.

    Raises:
        ConfigError: No row has an answer to compare with, or all rows of a set are left out.
    """
    questions, notes = {}, []
    for name, examples in sets.items():
        found, left_out = read_questions(tokenizer, datasets, examples, section.rows, data.max_seq_len)
        reasons = ", ".join(f"{count:,} with {reason}" for reason, count in left_out.items())
        if reasons and not found:
            raise ConfigError(
                f"eval.metrics: no row of the set {name} can be asked: {reasons}. Hold out other rows, raise "
                "data.max_seq_len, or remove eval.metrics."
            )
        if found:
            questions[name] = found
        if reasons:
            notes.append(f"eval.metrics: of the set {name}, {len(found):,} rows are asked; left out: {reasons}.")
    if not questions:
        formats = ", ".join(sorted({report.format for report in datasets.all_reports}))
        raise ConfigError(
            f"eval.metrics: no held-out row has an answer in text to compare with (formats: {formats}); hold out "
            "conversations, or prompts with completions, or remove eval.metrics."
        )
    return questions, notes
