"""What a config would train on, without its model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora.config import RunConfig
from qlora.data import BatchPlan, DataReport, ExampleSet, Piece, add_new_tokens, pieces
from qlora.files import find_tokenizer
from qlora.files.json_files import parse_object
from qlora.model import datasets_from_section, load_tokenizer
from qlora.objectives.rows import unsupported_reasons
from qlora.training.schedule import resolve_total_steps


@dataclass(frozen=True, slots=True)
class Sample:
    """An example to look at.

    Attributes:
        number: Of the example, from 0.
        num_tokens: That it has.
        num_supervised: Of those, the ones that are learned.
        pieces: Its text.
    """

    number: int
    num_tokens: int
    num_supervised: int
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Preview:
    """What a config would train on.

    Attributes:
        reports: One per source: of training, then of evaluation.
        train_examples: An epoch sees.
        eval_examples: Are held out.
        tokens_per_epoch: Of the examples.
        max_seq_len: Of the config.
        packing_fill: Share of the packed rows that tokens take; None where nothing is packed.
        rows_per_epoch: Packed rows, or examples where nothing is packed.
        steps_per_epoch: Optimizer steps, on one process.
        total_steps: Of the run.
        problems: Why the config can't be trained as it is.
        samples: Spread evenly over the training examples.
    """

    reports: list[DataReport]
    train_examples: int
    eval_examples: int
    tokens_per_epoch: int
    max_seq_len: int
    packing_fill: float | None
    rows_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    problems: list[str]
    samples: list[Sample]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def preview(config: RunConfig, num_samples: int = 5) -> Preview:
    """Tokenizes a config's data as a run would, bad rows left out, and looks at it.

    Args:
        config: Of :func:`qlora.load_config`.
        num_samples: Examples to show.

    Raises:
        QLoRAError: The tokenizer or a source can't be read, or nothing is left to learn from.
    """
    section = config.train
    model = config.model
    folder = find_tokenizer(model.base, model.revision, model.trust_remote_code)
    tokenizer = load_tokenizer(folder, model.trust_remote_code)
    new_ids = add_new_tokens(tokenizer, config.data.new_tokens)
    data = config.data.model_copy(update={"on_bad_row": "drop"})
    datasets = datasets_from_section(data, tokenizer, section.seed, new_ids=new_ids)
    problems = unsupported_reasons(section.objective, datasets.reports)
    num_bad = sum(report.bad_rows for report in datasets.reports)
    if num_bad and config.data.on_bad_row == "error":
        problems.append(f"data.on_bad_row: error, and {num_bad} rows can't be used.")
    lengths = datasets.train.lengths
    positions, longest = _num_positions(folder), int(lengths.max())
    if positions is not None and longest > positions:
        problems.append(f"the longest example has {longest} tokens, but the model positions for {positions}.")
    batches = BatchPlan(
        lengths, section.micro_batch_size, section.gradient_accumulation_steps,
        data.max_seq_len if data.packing else None, group_size=datasets.train.group_size,
    )  # fmt: skip
    return Preview(
        reports=datasets.reports,
        train_examples=len(datasets.train),
        eval_examples=len(datasets.eval),
        tokens_per_epoch=int(lengths.sum()),
        max_seq_len=data.max_seq_len,
        packing_fill=batches.fill if data.packing else None,
        rows_per_epoch=len(batches.rows),
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=resolve_total_steps(section.epochs, section.max_steps, batches.steps_per_epoch),
        problems=problems,
        samples=_samples(tokenizer, datasets.train, num_samples),
    )


def _num_positions(folder: Path) -> int | None:
    """Tokens that the model's config has positions for, if there is one that says."""
    try:
        config = parse_object((folder / "config.json").read_bytes())
        positions = config.get("text_config", config).get("max_position_embeddings")
        return positions if isinstance(positions, int) else None
    except (OSError, ValueError, AttributeError):
        return None


def _samples(tokenizer: Any, examples: ExampleSet, count: int) -> list[Sample]:
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)).tolist()
    return [
        Sample(number, len(examples[number]), examples[number].num_supervised, pieces(tokenizer, examples[number]))
        for number in chosen
    ]
