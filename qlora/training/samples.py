"""Samples: greedy answers to a few prompts, which show what a run learns while it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config import DataSection, SamplesSection
from qlora.data import Datasets, check_prompts, encode_prompt, prompt_text, read_prompts, read_questions
from qlora.errors import ConfigError
from qlora.processes import Processes
from qlora.training.scoring import answer_together

# Characters of a prompt and of an answer in a line of the log.
SHOWN_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A prompt that is answered while a run trains.

    Attributes:
        ids: Ids of everything before the answer, as a server feeds it.
        text: The prompt, for people.
        reference: The answer in the data; None if there is none.
    """

    ids: list[int]
    text: str
    reference: str | None


@dataclass(frozen=True, slots=True)
class Sampler:
    """The prompts of `train.samples`.

    Attributes:
        prompts: The prompts; empty if the config asks for no samples.
        max_new_tokens: Largest number of tokens in an answer.
        max_tokens: Largest number of tokens in a batch.
        notes: What a user should know about the prompts.
    """

    prompts: Sequence[SamplePrompt] = ()
    max_new_tokens: int = 1
    max_tokens: int = 1
    notes: Sequence[str] = ()

    @classmethod
    def from_section(
        cls, section: SamplesSection | None, data: DataSection, tokenizer: Any, datasets: Datasets, batch_size: int
    ) -> "Sampler":
        """Read the prompts of a config.

        Args:
            section: Section of the config; None for no samples.
            data: Data section of the config.
            tokenizer: Tokenizer with the chat template set.
            datasets: The data.
            batch_size: Number of sequences of `data.max_seq_len` that fit into memory; a batch has as many tokens.

        Raises:
            ConfigError: No prompt can be answered, or one of a file is too long.
            DataError: The file has rows that are no prompts.
        """
        if section is None:
            return cls()
        if isinstance(section.prompts, int):
            prompts, notes = _held_out(section.prompts, data, tokenizer, datasets)
        else:
            prompts, notes = _from_file(section.prompts, data, tokenizer), []
        return cls(prompts, section.max_new_tokens, batch_size * data.max_seq_len, notes)

    def take(self, model: Any, tokenizer: Any, processes: Processes) -> list[dict[str, str]]:
        """Answer the prompts, each process a part of them; no random numbers are drawn.

        Returns:
            For each prompt, its text as `prompt`, the `answer`, and a `reference` if the data has one.
        """
        ids = [prompt.ids for prompt in self.prompts]
        answers = answer_together(model, tokenizer, ids, self.max_new_tokens, self.max_tokens, processes)
        return [
            {"prompt": prompt.text, "answer": answer}
            | ({} if prompt.reference is None else {"reference": prompt.reference})
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]


def check_file(section: SamplesSection | None) -> None:
    """Check that there is a file of prompts, if the config names one.

    Raises:
        ConfigError: There is none.
    """
    if section is not None and isinstance(section.prompts, str) and not Path(section.prompts).is_file():
        raise ConfigError(f"train.samples.prompts: there is no file {section.prompts}.")


def describe_sample(sample: Mapping[str, str]) -> str:
    """Return a sample as one line for the log."""
    return f"{_one_line(sample['prompt'])!r} → {_one_line(sample['answer'])!r}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}…"


def _held_out(
    count: int, data: DataSection, tokenizer: Any, datasets: Datasets
) -> tuple[list[SamplePrompt], list[str]]:
    """Return the prompts of held-out rows, evenly spread, and a note if there are fewer."""
    questions, left_out = read_questions(tokenizer, datasets, datasets.eval, count, data.max_seq_len)
    reasons = ", ".join(f"{number:,} with {reason}" for reason, number in left_out.items())
    if not questions:
        formats = ", ".join(sorted({report.format for report in datasets.all_reports}))
        raise ConfigError(
            f"train.samples.prompts: no held-out row can be asked ({reasons or f'formats: {formats}'}); name a file of "
            "prompts, or remove train.samples."
        )
    prompts = [SamplePrompt(each.prompt, each.text, each.reference) for each in questions]
    if len(prompts) == count:
        return prompts, []
    return prompts, [f"train.samples: {len(prompts)} of {count} held-out rows are asked{reasons and f'; {reasons}'}."]


def _from_file(path: str, data: DataSection, tokenizer: Any) -> list[SamplePrompt]:
    prompts = read_prompts(path)
    check_prompts(tokenizer, prompts)
    found = []
    for prompt in prompts:
        conversation = prompt.conversation
        ids = encode_prompt(tokenizer, conversation.messages, conversation.tools)
        if len(ids) > data.max_seq_len:
            raise ConfigError(
                f"train.samples.prompts: {prompt.origin} has {len(ids):,} tokens, more than data.max_seq_len "
                f"({data.max_seq_len:,}); shorten or remove it."
            )
        found.append(SamplePrompt(ids, prompt_text(conversation.messages), None))
    return found
